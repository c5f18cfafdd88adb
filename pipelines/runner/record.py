"""The record of a finished step: written last and atomically, so that its presence means done."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow.fs as pafs

from cluster import storage

NAME = "record.json"


@dataclass(frozen=True)
class Record:
    """`payload` is what the fingerprint was made of, kept so that a later miss can be explained field by field.

    `result` is what later steps read. Paths in it are relative to the step's folder.
    """

    step: str
    fingerprint: str
    payload: dict[str, Any]
    result: dict[str, Any]
    started: str
    duration_s: float
    environment: dict[str, str] = field(default_factory=dict)
    tracking_run: str = ""


@dataclass(frozen=True)
class Artifact:
    """A finished step as later steps see it: its folder and its result."""

    uri: str
    result: dict[str, Any]

    def path(self, *parts: str) -> str:
        return storage.join(self.uri, *parts)


def write(uri: str, record: Record) -> None:
    storage.write_atomic(storage.join(uri, NAME), json.dumps(asdict(record), indent=2, allow_nan=False).encode())


def read(uri: str) -> Record | None:
    """The record in a step's folder, or None while there is none."""
    path = storage.join(uri, NAME)
    return Record(**json.loads(storage.read_bytes(path))) if storage.exists(path) else None


def newest(root: str, step: str) -> Record | None:
    """The record of this step that was started last, under any fingerprint."""
    fs, path = storage.filesystem(storage.join(root, step))
    folders = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    uris = [storage.join(root, step, info.base_name) for info in folders if info.type == pafs.FileType.Directory]
    return max(filter(None, map(read, uris)), key=lambda record: record.started, default=None)
