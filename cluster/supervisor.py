"""What Ray Train's controller asks about a run: which checkpoint counts, and whether a failure is worth another start."""

import logging
from typing import Any

import torch.distributed as dist
from ray.exceptions import RayError, RayTaskError
from ray.train import Checkpoint, UserCallback, WorkerGroupError
from ray.train.v2._internal.exceptions import RayTrainError

from cluster import ledger

# Errors of what the code does, which does the same thing the next time.
_OF_CODE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    NotImplementedError,
    RecursionError,
    TypeError,
    ValueError,
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
# What happens to processes, connections and storage. Without torch's class for it, gloo raises RuntimeError.
_OF_SURROUNDINGS = (OSError, RayError, RayTrainError, dist.DistError)


def is_of_code(error: BaseException) -> bool:
    """Whether the error would come again. One that a data task raised counts as if the worker had raised it."""
    if isinstance(error, RayTaskError) and not isinstance(error, _OF_CODE):
        error = error.cause
    return isinstance(error, _OF_CODE)


def is_of_process(error: BaseException) -> bool:
    """Whether it is Ray's report of a process that died, or does not answer."""
    return isinstance(error, RayError | RayTrainError) and not isinstance(error, RayTaskError)


class Supervisor(UserCallback):
    """Ray Train calls it in the controller, which outlives the groups of workers but not the driver.

    The controller ends a run at once for any error that is raised here, but for WorkerGroupError, which counts as a failure of
    the group.
    """

    def __init__(self, run_uri: str, keep: int) -> None:
        self._run_uri, self._keep = run_uri, keep
        self._step: int | None = None
        self._seen: dict[tuple[str, str, int | None], list[str]] = {}  # and the notes, which name the start

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """All ranks have stored their share of a checkpoint."""
        entry = ledger.Entry(metrics[0]["step"], metrics[0]["score"])
        try:
            if (
                metrics[0]["start"] != ledger.starts(self._run_uri)[-1]
            ):  # the workers of a lost driver may live on for seconds
                raise RuntimeError(f"{self._run_uri} was started again by another driver, which goes on with it")
            ledger.add(self._run_uri, entry, self._keep)
        except OSError as error:
            message = f"checkpoint {entry.name} of {self._run_uri} could not be recorded, the one before is still good: {error}"
            raise WorkerGroupError(message, {0: OSError(message)}) from error
        self._step = entry.step

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """End the run for an error of code, whatever befell the other ranks, and for one that came twice without progress."""
        for error in worker_exceptions.values():
            if is_of_code(error):
                raise _final(error)
        for error in worker_exceptions.values():
            if isinstance(error, _OF_SURROUNDINGS):
                continue
            signature, notes = (type(error).__name__, str(error), self._step), getattr(error, "__notes__", [])
            if self._seen.setdefault(signature, notes) != notes:  # and not the same one, polled again
                error.add_note("It came twice with no checkpoint in between, and was not tried a third time.")
                raise _final(error)


def _final(error: Exception) -> Exception:
    """`error`, to be raised in the controller, whose log of it would be the third: after the worker's, before the driver's."""
    logging.getLogger("ray.train.v2._internal.execution.controller.controller").setLevel(logging.CRITICAL)
    return error
