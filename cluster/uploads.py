"""Checkpoints on their way from a worker to storage: in the background, one at a time."""

import hashlib
import shutil
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from cluster import ledger, storage


class Uploads:
    """What one worker saves. `step`: of the newest checkpoint, which stands or is on its way; None before the first."""

    def __init__(self, run_uri: str, start: str, step: int | None) -> None:
        self.step = step
        self._run_uri, self._start = run_uri, start
        self._idle = threading.Event()
        self._idle.set()
        self._failure: Exception | None = None

    def start(self, step: int, write: Callable[[str], None], score: float | None) -> None:
        """Write and send the checkpoint of `step`. Waits for the one before, and raises what made that fail."""
        import ray.train

        self.settle()
        if self._failure is not None:
            raise self._failure
        folder = tempfile.mkdtemp(prefix=_prefix(self._run_uri))
        self._idle.clear()
        try:
            write(folder)
            ray.train.report(
                {"step": step, "score": None if score is None else float(score), "start": self._start},
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                checkpoint_dir_name=ledger.name_of(step),
                checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
                checkpoint_upload_fn=partial(self._upload, self.step),
                delete_local_checkpoint_after_upload=False,  # also after one that failed, by the function itself
            )
        except Exception as error:
            error.add_note(f"in the checkpoint of step {step}, written to {folder}; {self._still_good(self.step)}")
            shutil.rmtree(folder, ignore_errors=True)
            self._idle.set()
            raise
        self.step = step

    def settle(self) -> None:
        """Wait until nothing is on its way."""
        self._idle.wait()

    def _upload(self, previous: int | None, checkpoint: Any, name: str) -> Any:
        """In a thread of Ray Train's, which stops the group for what is raised here."""
        import ray.train

        uri = storage.join(self._run_uri, name)
        try:
            storage.upload(checkpoint.path, uri)
        except Exception as error:
            kind = PermissionError if isinstance(error, PermissionError) else OSError
            self._failure = kind(f"checkpoint {uri} could not be stored: {error}; {self._still_good(previous)}")
            raise self._failure from error
        finally:
            shutil.rmtree(checkpoint.path, ignore_errors=True)
            self._idle.set()
        place = ray.train.get_context().get_storage()
        return ray.train.Checkpoint(f"{place.experiment_fs_path}/{name}", place.storage_filesystem)

    def _still_good(self, previous: int | None) -> str:
        if previous is None:
            return "there is no earlier one"
        return f"the one of step {previous} is still good: {storage.join(self._run_uri, ledger.name_of(previous))}"


def remove_leftovers(run_uri: str) -> None:
    """Remove what processes that were killed left on this machine of their checkpoints. No other may be saving."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_prefix(run_uri)}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _prefix(run_uri: str) -> str:
    return f"moca-checkpoint-{hashlib.sha256(run_uri.encode()).hexdigest()[:12]}-"
