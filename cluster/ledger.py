"""Which checkpoints of a run count: the newest ones and the best. One small file beside them, replaced as a whole.

What the file does not name is invisible, complete or not. Ray Train keeps such a file too, but overwrites it in place: a full
disk or a crash in that moment would cost all checkpoints.
"""

import contextlib
import json
import logging
import math
import time
from dataclasses import asdict, dataclass

from cluster import storage

_FILE = "checkpoints.json"
_PREFIX = "step_"
_STARTS = "starts"  # one empty file per start of the worker group, named by the time


@dataclass(frozen=True)
class Entry:
    """One complete checkpoint. score: lower is better, None where it was not scored."""

    step: int
    score: float | None = None

    @property
    def name(self) -> str:
        return name_of(self.step)


def name_of(step: int) -> str:
    """The folder of a step's checkpoint below the run's."""
    return f"{_PREFIX}{step:08d}"


def read(run_uri: str) -> list[Entry]:
    """The checkpoints of a run that are kept, oldest first."""
    try:
        return [Entry(**entry) for entry in json.loads(storage.read_bytes(storage.join(run_uri, _FILE)))]
    except FileNotFoundError:
        return []


def best(entries: list[Entry]) -> Entry | None:
    """The one with the lowest score, of equal ones the newest; None if none was scored."""
    return min((e for e in entries if e.score is not None), key=lambda e: (e.score, -e.step), default=None)


def add(run_uri: str, entry: Entry, keep: int) -> None:
    """Record a checkpoint that is complete from now on, and remove those that are neither among the newest `keep` nor the best."""
    if entry.score is not None and math.isnan(entry.score):
        entry = Entry(entry.step)
    entries = [*(e for e in read(run_uri) if e.step < entry.step), entry]
    kept = [e for e in entries if e in entries[-keep:] or e == best(entries)]
    storage.write_atomic(storage.join(run_uri, _FILE), json.dumps([asdict(e) for e in kept]).encode())
    for gone in entries:
        if gone not in kept:
            with _only_said():
                storage.delete(storage.join(run_uri, gone.name))


def sweep(run_uri: str) -> None:
    """Remove the folders that do not count: from uploads that a crash interrupted, and removals that failed."""
    counted = {entry.name for entry in read(run_uri)}
    there = {name.split("/")[0] for name, _ in storage.list_files(run_uri)}
    for name in sorted(there - counted):
        if name.startswith(_PREFIX):
            with _only_said():
                storage.delete(storage.join(run_uri, name))


def begin(run_uri: str) -> str:
    """Note that the group of workers starts; returns the name of this start."""
    name = str(time.time_ns())
    storage.write_atomic(storage.join(run_uri, _STARTS, name), b"")
    return name


def starts(run_uri: str) -> list[str]:
    """All starts of the group in the life of the run, the newest last."""
    return [name for name, _ in storage.list_files(storage.join(run_uri, _STARTS))]


@contextlib.contextmanager
def _only_said() -> None:
    """What could not be removed is in nobody's way: the next sweep tries again."""
    try:
        yield
    except OSError as error:
        logging.getLogger(__name__).warning("an old checkpoint was left behind: %s", error)
