"""Worker groups and tasks on an embedded Ray. What runs there is nested, so that Ray ships it by value."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from cluster import storage
from cluster.checkpoint import consolidate
from cluster.deepspeed_engine import DeepSpeedEngine
from cluster.engine import Engine, EngineConfig
from cluster.torch_engine import TorchEngine
from cluster.workers import ClusterConfig, Worker, run_tasks, run_workers

ENGINE = EngineConfig(eps=1.0, weight_decay=0.1)


pytestmark = pytest.mark.usefixtures("ray_session")


def training() -> Callable[[Worker, dict[str, Any]], dict[str, Any]]:
    def step_of(engine: Engine, step: int) -> None:
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        engine.backward(engine.forward(x.chunk(engine.world_size)[engine.rank]).square().sum() / 4, last=True)
        engine.step(0.1)

    def train(worker: Worker | None, config: dict[str, Any]) -> dict[str, Any]:
        """Steps of a real engine with a checkpoint every two; rank 1 fails before step `fail_at` of a first attempt."""
        torch.manual_seed(0)
        module = torch.nn.Linear(3, 3)
        engine = TorchEngine(module, ENGINE) if worker is None else DeepSpeedEngine(module, ENGINE)
        start = 0
        if worker is not None:
            with worker.restore() as directory:
                start = engine.load(directory)["step"] if directory else 0
        for step in range(start, config["steps"]):
            if worker and worker.rank == 1 and start == 0 and step == config["fail_at"]:
                time.sleep(1.0)  # a checkpoint counts from the controller's next poll on
                raise ValueError("the learning rate is blue")
            step_of(engine, step)
            if worker and step % 2:
                worker.save(step + 1, lambda folder, done=step + 1: engine.save(folder, {"step": done}))
        weights = torch.cat([p.detach().flatten() for p in module.parameters()]).tolist()
        return {"weights": weights, "start": start, "world_size": worker and worker.world_size}

    return train


def uninterrupted(steps: int) -> list[float]:
    return training()(None, {"steps": steps})["weights"]


def test_a_killed_worker_costs_no_step(tmp_path: Path) -> None:
    def count(worker: Worker, config: dict[str, Any]) -> dict[str, Any]:
        import torch.distributed as dist

        total, start = torch.zeros(()), 0
        with worker.restore() as directory:
            if directory:
                start, total = torch.load(Path(directory, f"rank{worker.rank}"))
        for step in range(start, 7):
            if step == 5 and start == 0 and worker.rank == 1:
                time.sleep(1.0)  # a checkpoint counts from the controller's next poll on
                os.kill(os.getpid(), signal.SIGKILL)
            term = torch.tensor(float(step * config["factor"] + worker.rank))
            dist.all_reduce(term)
            total = total + term
            if step % 2:
                content = (step + 1, total)
                worker.save(step + 1, lambda folder, c=content: torch.save(c, Path(folder, f"rank{worker.rank}")))
                worker.save(step + 1, lambda folder: pytest.fail("saved twice"))
        ranks = worker.rank, worker.world_size
        return {"total": total.item(), "start": start, "ranks": ranks, "accelerator": os.environ["DS_ACCELERATOR"]}

    cluster = ClusterConfig(num_workers=2, max_failures=1)
    result = run_workers(count, {"factor": 10}, cluster=cluster, storage_uri=str(tmp_path), name="killed")
    assert result.value["start"] == 4  # the second attempt is the one that finished
    assert result.restarts == 1
    assert result.value["total"] == sum(2 * 10 * step + 1 for step in range(7))
    assert result.value["ranks"] == (0, 2)
    assert result.value["accelerator"] == "cpu"
    assert result.checkpoint_uri == str(tmp_path / "killed" / "step_00000006")
    assert [name for name, _ in storage.list_files(result.checkpoint_uri)] == ["rank0", "rank1"]
    assert result.best_uri is None
    assert {path.name for path in (tmp_path / "killed").glob("step_*")} == {"step_00000004", "step_00000006"}
    assert not [name for name in os.listdir(os.environ["TMPDIR"]) if name.startswith("moca-checkpoint-")]


def test_checkpoints_go_to_storage_in_the_background_and_a_sigterm_is_a_notice(tmp_path: Path) -> None:
    def train(worker: Worker, config: dict[str, Any]) -> list[float]:
        upload, waits = storage.upload, []
        storage.upload = lambda folder, uri: (time.sleep(2 * uri.endswith("00000001")), upload(folder, uri))
        for step, score in ((1, 0.3), (2, 0.1), (3, 0.2), (4, None)):
            started = time.monotonic()
            worker.save(step, lambda folder: Path(folder, f"rank{worker.rank}").write_text("x"), score)
            waits.append(time.monotonic() - started)
        if worker.rank == 1:
            assert not worker.preempted()
            os.kill(os.getpid(), signal.SIGTERM)
            while not worker.preempted():
                time.sleep(0.1)
            (tmp_path / "had the notice").touch()
        return waits

    cluster = ClusterConfig(num_workers=2, max_failures=0)
    result = run_workers(train, {}, cluster=cluster, storage_uri=str(tmp_path), name="saved")
    assert result.value[0] < 1.5 < result.value[1] < 4  # the second waits for the first
    assert (tmp_path / "had the notice").exists()
    run = tmp_path / "saved"
    assert (result.checkpoint_uri, result.best_uri) == (str(run / "step_00000004"), str(run / "step_00000002"))
    assert {path.name for path in run.glob("step_*")} == {f"step_0000000{step}" for step in (2, 3, 4)}
    assert [name for name, _ in storage.list_files(result.checkpoint_uri)] == ["rank0", "rank1"]
    assert result.restarts == 0


@pytest.mark.slow
def test_a_failed_run_continues_with_other_workers_on_s3(s3: str) -> None:
    config = {"steps": 4, "fail_at": 3}
    where = {"storage_uri": f"{s3}/runs", "name": "failed"}
    with pytest.raises(ValueError, match="the learning rate is blue"):
        run_workers(training(), config, cluster=ClusterConfig(num_workers=2, max_failures=0), **where)
    result = run_workers(training(), config, cluster=ClusterConfig(num_workers=1, max_failures=0), **where)
    assert result.value["start"] == 2
    assert result.value["world_size"] == 1
    assert result.restarts == 1
    assert result.value["weights"] == pytest.approx(uninterrupted(4), rel=1e-5)
    assert result.checkpoint_uri == f"{s3}/runs/failed/step_00000004"
    weights = consolidate(storage.localize(result.checkpoint_uri))
    assert torch.cat([weights["weight"].flatten(), weights["bias"]]).tolist() == result.value["weights"]


def test_no_room_is_said_at_once(tmp_path: Path) -> None:
    there = int(ray.cluster_resources()["CPU"])
    started = time.monotonic()
    for cluster, asked in (
        (ClusterConfig(num_workers=there + 1, cpus_per_worker=1), f"{there + 1} worker.*1 CPU"),
        (ClusterConfig(num_workers=2, cpus_per_worker=there), f"2 worker.*{there} CPU"),
        (ClusterConfig(gpus_per_worker=64), "64 GPU"),
    ):
        with pytest.raises(ValueError, match=f"{asked}.*the cluster has {there} CPU"):
            run_workers(training(), {}, cluster=cluster, storage_uri=str(tmp_path), name="never")
    with pytest.raises(ValueError, match="64 GPU"):
        run_tasks(abs, [(1,)], cpus=0.5, gpus=64)
    assert time.monotonic() - started < 5
    assert os.listdir(tmp_path) == []


def test_tasks_run_side_by_side_in_order(tmp_path: Path) -> None:
    def work(name: str, waits_for: list[str]) -> tuple[str, int]:
        (tmp_path / name).touch()
        deadline = time.monotonic() + 60
        while not all((tmp_path / other).exists() for other in waits_for):
            assert time.monotonic() < deadline, f"{name} never saw all of {waits_for}"
            time.sleep(0.02)
        (tmp_path / f"{name} is done").touch()
        return name, os.getpid()

    # None ends before all have begun, and the first ends last.
    items = [("a", ["b is done", "c is done"]), ("b", ["a", "c"]), ("c", ["a", "b"])]
    found = run_tasks(work, items, cpus=0.5, gpus=0)
    assert [name for name, _ in found] == ["a", "b", "c"]
    assert len({os.getpid(), *(pid for _, pid in found)}) == 4
    assert run_tasks(work, [], cpus=0.5, gpus=0) == []


def test_a_task_error_is_raised_after_the_others_end(tmp_path: Path) -> None:
    def work(index: int) -> None:
        if index == 0:
            raise KeyError("row 7")
        time.sleep(1)
        (tmp_path / str(index)).touch()

    with pytest.raises(KeyError, match="row 7"):
        run_tasks(work, [(0,), (1,)], cpus=0.5, gpus=0)
    assert os.listdir(tmp_path) == ["1"]


def test_workers_are_told_what_they_need() -> None:
    def environment() -> dict[str, Any]:
        import cluster

        names = ("OMP_NUM_THREADS", "RAY_API_SERVER_ADDRESS")
        return {"package": cluster.__file__, **{name: os.environ[name] for name in names}}

    (seen,) = run_tasks(environment, [()], cpus=0.5, gpus=0)
    assert Path(seen["package"]) == Path(storage.__file__).with_name("__init__.py")
    assert seen["OMP_NUM_THREADS"] == "1"
    assert seen["RAY_API_SERVER_ADDRESS"] == ray.get_runtime_context().gcs_address  # and no other Ray's of the machine


def test_ray_data_keeps_order_and_quiet() -> None:
    context = ray.data.DataContext.get_current()
    assert context.execution_options.preserve_order
    assert not context.enable_progress_bars
    assert context.execution_no_progress_timeout_s >= 3600  # a long checkpoint is not a stall
    assert [c.__name__ for c in context.custom_execution_callback_classes].count("RestBetweenSteps") == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_workers", 0),
        ("min_workers", 0),
        ("min_workers", 3),
        ("cpus_per_worker", 0),
        ("zero_stage", 4),
        ("object_store_mb", 1),
        ("checkpoint_keep", 0),
    ],
)
def test_bad_config_names_field_and_value(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} {value}"):
        ClusterConfig(**{field: value})
