"""Tasks from the files of any layout to storage, checked: once for what the files hold, wherever they lie.

tasks/DIGEST/tasks.json     of a source: {task: how many queries and candidates}, written last
"""

import hashlib
import json
import posixpath
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pyarrow.fs as pafs

from cluster import storage
from moca_core import sources
from moca_core.benchmarks import Metric, Prompts, known_name
from moca_core.data.image_files import ImageBounds
from pipelines.evaluation.engine import finish
from pipelines.evaluation.tasks import SIDES, StoredTask, write_task
from pipelines.sources import Source, check_layouts
from pipelines.tables import open_table

VERSION = 2  # raised by hand when the same files would make another task


@dataclass(frozen=True)
class Asking:
    """How tasks that no public benchmark has are asked and measured; prompts that are given are for all tasks."""

    prompts: Prompts | None = None
    metric: Metric | None = None

    def task(self, name: str, uri: str, layout: str) -> StoredTask:
        by_layout: Metric = "ndcg_at_10" if layout == "beir" else "precision_at_1"
        return StoredTask.of(name, uri, self.prompts, self.metric or by_layout)


def prepare(given: tuple[Source, ...], asking: Asking, uri: str, say: Callable[[str], None]) -> list[StoredTask]:
    """All tasks of the sources; those that are not there yet are written below `uri`. Raises ValueError for two of one name."""
    check_layouts("--tasks", given, sources.TASKS)
    whole = [source for one in given for source in by_task(one)]
    folders = [storage.join(uri, "tasks", _digest(source)) for source in whole]
    missing = [n for n, folder in enumerate(folders) if not storage.exists(storage.join(folder, "tasks.json"))]
    say(f"tasks: {len(missing)} of {len(whole)} source(s) to read")
    fn = partial(_write, to_read=[whole[n] for n in missing], folders=[folders[n] for n in missing])
    finish(fn, len(missing), [folders[n] for n in missing], uri, say)
    tasks = []
    for source, folder in zip(whole, folders, strict=True):
        for name in json.loads(storage.read_bytes(storage.join(folder, "tasks.json"))):
            tasks.append(asking.task(name, storage.join(folder, name), source.layout))
    return tasks


def by_task(source: Source) -> list[Source]:
    """A folder of folders that are called after tasks of a benchmark as a source each, so that workers share it."""
    if (
        not source.images or source.layout == "beir"
    ):  # without that folder images lie below the top, which must stay the top
        return [source]
    fs, path = storage.filesystem(source.path)
    entries = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    names = sorted(
        e.base_name for e in entries if e.type == pafs.FileType.Directory and not e.base_name.startswith(".")
    )
    if not names or not all(map(known_name, names)):
        return [source]
    return [replace(source, path=storage.join(source.path, name)) for name in names]


def _digest(source: Source) -> str:
    return hashlib.sha256(repr((VERSION, source.identity())).encode()).hexdigest()[:32]


def _write(number: int, *, to_read: list[Source], folders: list[str]) -> dict:
    source, folder, counts = to_read[number], folders[number], {}
    for task in source.adapter(sources.TASKS).read_tasks(source.location()):
        if task.name in counts:
            raise ValueError(f"two tasks are called {task.name}; rename a file or its folder")
        counts[task.name] = write_task(task, storage.join(folder, task.name), ImageBounds())
    storage.write_atomic(storage.join(folder, "tasks.json"), json.dumps(counts).encode())
    return {}


def stored_tasks(uri: str, asking: Asking) -> list[StoredTask]:
    """Tasks that a pipeline's step `pairs` wrote, found below its folder. Raises ValueError where there is none."""
    names = [posixpath.dirname(path) for path, _ in storage.list_files(uri) if path.endswith(f"{SIDES[0]}.parquet")]
    if not names:
        raise ValueError(
            f"{uri}: no {SIDES[0]}.parquet below it; the folder of a step `pairs` is needed, or one of its tasks"
        )
    tasks = [
        asking.task(
            name.removeprefix("tasks/") or posixpath.basename(uri.rstrip("/")), storage.join(uri, name), "stored"
        )
        for name in names
    ]
    for task in tasks:
        if "id" not in open_table(task.table(SIDES[0])).schema_arrow.names:
            raise ValueError(f"{task.uri}: written by an older version, without ids; run its step `pairs` again")
    return tasks
