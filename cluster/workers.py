"""Run functions on the cluster: a group of training workers that survives failures, or plain tasks side by side.

Ray is either the cluster this process belongs to (RAY_ADDRESS is set, as in every Ray job) or one inside this process.
"""

import contextlib
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cluster import storage

_connecting = threading.Lock()
_STARTS = "starts"  # one small file per start of the worker group, beside Ray Train's own files of a run


@dataclass(frozen=True)
class ClusterConfig:
    """How much of the cluster a worker group takes. Changes speed and safety, never a result.

    cpus_per_worker may be a fraction: on a small machine the data stages need what is left. max_failures: how often
    the group is started again before the run fails. object_store_mb: Ray's shared memory when it runs inside this
    process. worker_start_timeout_s: how long a cluster that can grow may take to offer the resources.
    """

    num_workers: int = 2
    cpus_per_worker: float = 0.5
    gpus_per_worker: float = 0
    zero_stage: int = 2
    max_failures: int = 3
    object_store_mb: int = 384
    checkpoint_keep: int = 2
    worker_start_timeout_s: float = 120.0

    def __post_init__(self) -> None:
        for name, least in (("num_workers", 1), ("checkpoint_keep", 1), ("max_failures", 0), ("gpus_per_worker", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)} must be at least {least}")
        if self.cpus_per_worker <= 0:
            raise ValueError(f"cpus_per_worker {self.cpus_per_worker} must be positive (0.5 is fine)")
        if self.zero_stage not in (1, 2, 3):
            raise ValueError(f"zero_stage {self.zero_stage!r} must be 1, 2 or 3")
        if self.object_store_mb < 80:
            raise ValueError(f"object_store_mb {self.object_store_mb} is less than Ray's minimum of 80")
        if self.worker_start_timeout_s <= 0:
            raise ValueError(f"worker_start_timeout_s {self.worker_start_timeout_s} must be positive")


@dataclass(frozen=True)
class WorkerResult:
    """value: what rank 0's function returned. checkpoint_uri: the newest checkpoint, None if none was saved.

    restarts: how often the group was started again in the life of the run, earlier drivers included.
    """

    value: Any
    checkpoint_uri: str | None
    restarts: int


@dataclass(frozen=True)
class Worker:
    """What a function on a worker knows of its group. torch.distributed is initialised (gloo, or nccl with GPUs)."""

    rank: int
    world_size: int
    local_rank: int
    run_uri: str

    @contextlib.contextmanager
    def restore(self) -> Iterator[str | None]:
        """A local folder (read only) with the newest checkpoint, all ranks' files merged; None at the very start."""
        import ray.train

        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as directory:
            yield directory

    def save(self, step: int, write: Callable[[str], None]) -> None:
        """Make a checkpoint of `step`: every rank fills its own folder with `write(folder)`, storage gets them merged.

        Collective. It is uploaded when this returns, and it counts (is complete, restorable, older ones are removed)
        within a poll of Ray Train: a crash right after may restart from the one before. The checkpoint of a step is
        written once: saving the step that is the newest already does nothing.
        """
        import ray.train
        import torch.distributed as dist

        name = f"step_{step:08d}"
        newest = ray.train.get_checkpoint()
        if newest is not None and Path(newest.path).name == name:
            return
        if self.rank == 0:  # what a crash in the middle of an upload left would mix with the new files
            storage.delete(storage.join(self.run_uri, name))
        dist.barrier()
        folder = tempfile.mkdtemp(prefix="moca-checkpoint-")
        try:
            write(folder)
            ray.train.report(
                {"step": step},
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                checkpoint_dir_name=name,
                checkpoint_upload_mode=ray.train.CheckpointUploadMode.SYNC,
                delete_local_checkpoint_after_upload=True,
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def connect(config: ClusterConfig) -> None:
    """Make `ray` usable in this process, with this project's defaults for Ray Data; calling it again is fine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A report waits for the controller's next poll, and saving a checkpoint is a report.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # it prints every line twice
    import ray

    with _connecting:
        if not ray.is_initialized():
            variables = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
            if _on_a_cluster():
                ray.init(runtime_env={"env_vars": _unset(variables)}, logging_level=logging.WARNING)
            else:
                repository = str(Path(__file__).resolve().parents[1])
                variables |= {"OMP_NUM_THREADS": "1"}
                path = os.pathsep.join(filter(None, [repository, os.environ.get("PYTHONPATH")]))
                os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes this machine away
                ray.init(
                    address="local",
                    # Logical: with one CPU per core, two workers would leave none to the data tasks that feed them.
                    num_cpus=max(4, os.cpu_count() or 1),
                    include_dashboard=False,
                    object_store_memory=config.object_store_mb * 2**20,
                    logging_level=logging.ERROR,  # warns about its own new defaults
                    runtime_env={
                        "env_vars": {**_unset(variables), "PYTHONPATH": path},
                        "worker_process_setup_hook": "cluster.workers.calm_ray_logs",
                    },
                )
        set_data_defaults()


def run_workers(
    fn: Callable[[Worker, dict[str, Any]], Any],
    config: dict[str, Any],
    *,
    cluster: ClusterConfig,
    storage_uri: str,
    name: str,
) -> WorkerResult:
    """Run `fn(worker, config)` on `cluster.num_workers` workers until all have returned.

    A worker that dies or raises stops the group, which starts again from the newest checkpoint (`Worker.restore`),
    `max_failures` times at most; then what a worker raised is raised here, or ray.train.TrainingFailedError if a
    process died. Everything a run leaves lies under `storage_uri/name`. Calling with the same two again CONTINUES the
    run, also in another process or with other workers: the name must identify the content. ValueError if the cluster
    has no room.
    """
    connect(cluster)
    require_room(cluster.num_workers, cluster.cpus_per_worker, cluster.gpus_per_worker, cluster.worker_start_timeout_s)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(cluster.worker_start_timeout_s)
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchConfig, TorchTrainer

    filesystem, path = storage.filesystem(storage_uri)
    run_uri = storage.join(storage_uri, name)
    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    trainer = TorchTrainer(
        partial(_worker_main, fn, run_uri, bool(cluster.gpus_per_worker)),
        train_loop_config=config,
        torch_config=TorchConfig(backend="nccl" if cluster.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers, use_gpu=bool(cluster.gpus_per_worker), resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=cluster.checkpoint_keep),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        result = trainer.fit()
    except WorkerGroupError as error:
        _raise_own_error(error)
        raise
    newest = storage.join(run_uri, Path(result.checkpoint.path).name) if result.checkpoint else None
    return WorkerResult(result.return_value, newest, len(storage.list_files(storage.join(run_uri, _STARTS))) - 1)


def run_tasks(fn: Callable[..., Any], items: list[tuple], *, cpus: float, gpus: float) -> list:
    """[fn(*item) for item in items], as tasks side by side, each with its share of CPUs and GPUs; results in order.

    The first task's error is raised once all have ended. A task whose process dies is tried again. ValueError if no
    machine of the cluster has the resources for one task. Needs `connect` first.
    """
    import ray

    if not items:
        return []
    require_room(1, cpus, gpus, ClusterConfig.worker_start_timeout_s)
    task = ray.remote(fn).options(num_cpus=cpus, num_gpus=gpus)
    references = [task.remote(*item) for item in items]
    # Not cancelled at the first error: ray.cancel on a task that is just ending aborts this whole process (Ray 2.60).
    ray.wait(references, num_returns=len(references), fetch_local=False)
    return ray.get(references)


def require_room(workers: int, cpus: float, gpus: float, timeout_s: float) -> None:
    """ValueError unless the cluster's machines can hold that many workers; Ray itself would wait for ever.

    A cluster with an autoscaler is asked to grow and given `timeout_s`. What other work occupies now does not matter:
    it ends.
    """
    import ray

    def room() -> int:
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        shares = [
            min(machine.get(kind, 0) / share for kind, share in (("CPU", cpus), ("GPU", gpus)) if share)
            if cpus or gpus
            else workers
            for machine in machines
        ]
        return sum(int(share + 1e-6) for share in shares)

    deadline = time.monotonic() + (timeout_s if _on_a_cluster() else 0)
    if room() < workers and _on_a_cluster():
        from ray.autoscaler.sdk import request_resources

        request_resources(bundles=[{"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}] * workers)
        while room() < workers and time.monotonic() < deadline:
            time.sleep(1)
        request_resources(bundles=[])  # the group's own demand holds the machines from here on
    if room() < workers:
        there = ray.cluster_resources()
        raise ValueError(
            f"no room for {workers} worker(s) with {cpus:g} CPU and {gpus:g} GPU each: the cluster has "
            f"{there.get('CPU', 0):g} CPU and {there.get('GPU', 0):g} GPU on {len(ray.nodes())} machine(s); "
            "lower num_workers, cpus_per_worker or gpus_per_worker"
        )


def set_data_defaults() -> None:
    """Ray Data in this process: keep row order, no progress bars, fail after two minutes without progress."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = 120
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def calm_ray_logs() -> None:
    """Ray calls this when one of its processes starts.

    Without a dashboard, one part of Ray Train would warn once a second.
    """
    module = "ray.train.v2._internal.execution.controller.placement_group_cleaner"
    logging.getLogger(module).setLevel(logging.ERROR)


def _worker_main(fn: Callable[[Worker, dict[str, Any]], Any], run_uri: str, gpus: bool, config: dict[str, Any]) -> Any:
    import ray.train

    if not gpus:
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is first imported
    set_data_defaults()
    context = ray.train.get_context()
    rank = context.get_world_rank()
    if rank == 0:
        storage.write_atomic(storage.join(run_uri, _STARTS, f"{time.time_ns()}"), b"")
    return fn(Worker(rank, context.get_world_size(), context.get_local_rank(), run_uri), config)


def _raise_own_error(error: Any) -> None:
    """Raise what a worker raised, if one raised rather than died: the lowest rank's."""
    from ray.exceptions import RayError

    for _, failure in sorted(error.worker_failures.items()):
        if not isinstance(failure, RayError):
            raise failure from error


def _on_a_cluster() -> bool:
    return bool(os.environ.get("RAY_ADDRESS"))


def _unset(variables: dict[str, str]) -> dict[str, str]:
    """Those that this process's environment does not set: what the user or the job set reaches the workers anyway."""
    return {name: value for name, value in variables.items() if name not in os.environ}
