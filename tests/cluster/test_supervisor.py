"""Which failures are worth another start, and what ends a run."""

from pathlib import Path

import pytest
import torch.distributed as dist
from ray.exceptions import ActorDiedError, RayTaskError, WorkerCrashedError
from ray.train import WorkerGroupError

from cluster import ledger, storage
from cluster.supervisor import Supervisor, is_of_code, is_of_process

DEAD = ActorDiedError()
GLOO = "[pair.cc:553] Connection closed by peer [127.0.0.1]:"


def of_task(error: Exception) -> Exception:
    """As a failing task of Ray Data reaches the worker that reads from it."""
    task = RayTaskError("map", "Traceback ...", error)
    return task.as_instanceof_cause()


def raised_in(start: int, error: Exception) -> Exception:
    error.add_note(f"Raised on rank 1 of 2 in start {start}")
    return error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        KeyError("x"),
        FloatingPointError("x"),
        AssertionError("x"),
        FileNotFoundError("no model"),
        PermissionError("403"),
        of_task(ValueError("row 7")),
        UnicodeDecodeError("utf-8", b"x", 0, 1, "x"),
    ],
    ids=repr,
)
def test_an_error_of_code_ends_the_run_whatever_befell_the_others(error: Exception) -> None:
    assert is_of_code(error) and not is_of_process(error)
    for others in ({}, {0: RuntimeError(f"{GLOO}1")}, {0: DEAD}):
        with pytest.raises(type(error)):
            Supervisor("unused", 1).after_exception(None, {**others, 1: error})


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        ConnectionResetError("x"),
        TimeoutError("x"),
        dist.DistBackendError("NCCL communicator was aborted"),
        DEAD,
        of_task(OSError("503")),
        of_task(WorkerCrashedError()),
    ],
    ids=repr,
)
def test_what_befalls_processes_connections_and_storage_is_left_to_max_failures(error: Exception) -> None:
    supervisor = Supervisor("unused", 1)
    for start in range(5):
        supervisor.after_exception(None, {1: raised_in(start, error)})


def report(supervisor: Supervisor, step: int, score: float | None, start: str) -> None:
    supervisor.after_report(None, [{"step": step, "score": score, "start": start}], None)


def test_any_other_error_may_come_back_only_after_a_checkpoint(tmp_path: Path) -> None:
    supervisor = Supervisor(str(tmp_path), 1)
    again = [raised_in(start, RuntimeError("sizes 3 and 4 do not match")) for start in range(4)]
    supervisor.after_exception(None, {1: again[0]})
    supervisor.after_exception(None, {1: again[0], 0: RuntimeError(f"{GLOO}1")})  # polled once more
    report(supervisor, 2, None, ledger.begin(str(tmp_path)))
    supervisor.after_exception(None, {1: again[1]})
    supervisor.after_exception(None, {1: raised_in(2, RuntimeError("sizes 5 and 6 do not match"))})
    with pytest.raises(RuntimeError, match="sizes 3 and 4") as caught:
        supervisor.after_exception(None, {1: again[3]})
    assert "came twice with no checkpoint in between" in caught.value.__notes__[-1]


def test_a_checkpoint_that_cannot_be_recorded_counts_as_a_failure_of_the_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor, start = Supervisor(str(tmp_path), 1), ledger.begin(str(tmp_path))
    report(supervisor, 2, 0.5, start)

    def refuse(uri: str, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "write_atomic", refuse)
    with pytest.raises(WorkerGroupError, match=r"step_00000004 .* the one before is still good: .*No space left"):
        report(supervisor, 4, None, start)
    assert ledger.read(str(tmp_path)) == [ledger.Entry(2, 0.5)]


def test_what_outlives_a_lost_driver_records_nothing_once_the_run_was_started_again(tmp_path: Path) -> None:
    lost, old = Supervisor(str(tmp_path), 1), ledger.begin(str(tmp_path))
    report(lost, 2, None, old)
    new = ledger.begin(str(tmp_path))
    with pytest.raises(RuntimeError, match="started again by another driver"):
        report(lost, 4, None, old)
    report(Supervisor(str(tmp_path), 1), 3, None, new)
    assert [entry.step for entry in ledger.read(str(tmp_path))] == [3]
