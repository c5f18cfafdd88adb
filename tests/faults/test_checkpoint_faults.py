"""What goes wrong while a checkpoint is stored: the one before is still good, the error is clear, a later call goes on."""

import contextlib
import ctypes
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import ledger, storage
from cluster.workers import ClusterConfig, Worker, WorkerResult, run_workers
from tests.faults.failing_s3 import FailingS3, seeded

pytestmark = pytest.mark.usefixtures("ray_session")

MIB = 2**20


def saving() -> Callable[[Worker, dict[str, Any]], dict[str, Any]]:
    def train(worker: Worker, config: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint per step, of `mib` from each rank, that says which step it is; the contents of the first one found."""
        import torch.distributed as dist

        start = 0
        with worker.restore() as folder:
            if folder:
                found = [Path(folder, f"rank{rank}").read_bytes() for rank in range(worker.world_size)]
                start = found[0][0]
                assert found == [bytes([start]) * int(config["mib"][start - 1] * MIB)] * 2
        for step in range(start + 1, len(config["mib"]) + 1):
            dist.barrier()
            content = bytes([step]) * int(config["mib"][step - 1] * MIB)
            worker.save(step, lambda folder, content=content: Path(folder, f"rank{worker.rank}").write_bytes(content))
            time.sleep(1.0)  # so that it counts before the next one
        return {"start": start}

    return train


def run(uri: str, mib: list[float]) -> WorkerResult:
    cluster = ClusterConfig(num_workers=2, max_failures=0, checkpoint_keep=1)
    return run_workers(saving(), {"mib": mib}, cluster=cluster, storage_uri=uri, name="run")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    libc, folder = ctypes.CDLL(None, use_errno=True), tmp_path / "disk"
    folder.mkdir()
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, b"size=8m"):
        pytest.skip(f"a small file system cannot be mounted here: {os.strerror(ctypes.get_errno())}")
    yield folder
    libc.umount2(os.fsencode(folder), 2)  # also while a process looks at it


@pytest.mark.slow
def test_a_full_disk_costs_no_checkpoint_but_the_one_that_did_not_fit(small_disk: Path) -> None:
    first = small_disk / "run" / "step_00000001"
    with pytest.raises(OSError, match="No space left on device") as caught:
        run(str(small_disk), [1, 5, 1])
    for word in ("step_00000002 could not be stored", f"the one of step 1 is still good: {first}"):
        assert word in str(caught.value)
    assert [entry.step for entry in ledger.read(str(small_disk / "run"))] == [1]
    assert {path.name: path.read_bytes() for path in first.iterdir()} == {f"rank{r}": b"\1" * MIB for r in (0, 1)}
    result = run(str(small_disk), [1, 1, 1])
    assert result.value == {"start": 1}
    assert result.checkpoint_uri == str(small_disk / "run" / "step_00000003")
    assert [path.name for path in (small_disk / "run").glob("step_*")] == ["step_00000003"]


@pytest.mark.slow
def test_an_s3_that_refuses_costs_no_checkpoint_but_the_one_that_it_refused(failing_s3: FailingS3) -> None:
    uri, disturbed = storage.join(failing_s3.uri, "refused"), seeded(seed=2, share=0.2)

    def refuse(request: str, seen: int, in_a_row: int) -> str | None:
        second = request.startswith("PUT") and "step_00000002" in request
        return "403" if second else disturbed(request, seen, in_a_row)

    failing_s3.faults.plan = refuse
    with pytest.raises(PermissionError, match=r"step_00000002 could not be stored: .*Access Denied") as caught:
        run(uri, [0.5, 0.5, 0.5])
    assert f"the one of step 1 is still good: {uri}/run/step_00000001" in str(caught.value)
    failing_s3.faults.plan = disturbed
    result = run(uri, [0.5, 0.5, 0.5])
    assert result.value == {"start": 1}
    with failing_s3.undisturbed():
        assert [entry.step for entry in ledger.read(f"{uri}/run")] == [3]
        there = {name.split("/")[0] for name, _ in storage.list_files(f"{uri}/run")}
        assert {name for name in there if name.startswith("step_")} == {"step_00000003"}
        for rank in (0, 1):
            assert storage.read_bytes(f"{result.checkpoint_uri}/rank{rank}") == b"\3" * (MIB // 2)
    assert failing_s3.injected.total() > 10


def test_an_error_on_one_rank_ends_the_wait_of_the_others(tmp_path: Path) -> None:
    def train(worker: Worker, config: dict[str, Any]) -> None:
        import torch
        import torch.distributed as dist

        dist.barrier()
        if worker.rank == 1:
            (tmp_path / "raised").write_text(str(time.time()))
            raise FloatingPointError("step 7: loss nan")
        with contextlib.suppress(RuntimeError):  # what becomes of this rank must not matter
            dist.all_reduce(torch.ones(()))

    with pytest.raises(FloatingPointError, match="step 7: loss nan") as caught:
        run_workers(train, {}, cluster=ClusterConfig(max_failures=3), storage_uri=str(tmp_path), name="nan")
    assert time.time() - float((tmp_path / "raised").read_text()) < 30
    assert "on rank 1 of 2" in caught.value.__notes__[0] and "in train" in caught.value.__notes__[0]
    assert len(ledger.starts(str(tmp_path / "nan"))) == 1
