"""A batch job over numbered units, on Ray Data: who starts it again after a crash runs only what is not finished."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from cluster.placement import for_training, on_cpus, require_room

_PROGRESS_S = 10.0


@dataclass(frozen=True)
class Pool:
    """So many processes that stay, each with its share of CPUs and GPUs, on machines for training."""

    processes: int
    cpus: float
    gpus: float

    @staticmethod
    def of_all(processes: int | None = None) -> "Pool":
        """So many processes, or one for every GPU (without any: one), with half of the CPUs: the rest is for what feeds them. Needs
        `connect` first."""
        import ray

        there = ray.cluster_resources()
        gpus = int(there.get("GPU", 0))
        count = processes or gpus or 1
        largest = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
        share = min(there["CPU"] / count, largest) / 2
        whole = 1 if gpus else int(share)  # Ray takes fractions of one CPU alone
        return Pool(count, share if share < 1 else whole, 1 if gpus else 0)


def run_units(
    fn: Callable[[int], dict[str, Any]] | Callable[[], Callable[[int], dict[str, Any]]],
    count: int,
    *,
    state_uri: str,
    say: Callable[[str], None],
    pool: Pool | None = None,
) -> list[dict[str, Any]]:
    """[fn(0), ..., fn(count - 1)], run as tasks side by side on CPUs; each result a dict that JSON can hold.

    With a `pool` every process of it calls `fn()` once, and what that returns is called with the numbers: so a model is loaded once.
    ValueError if no machine of the cluster has room for one of them.
    What is finished is kept below `state_uri` by Ray Data's job-level checkpoint: a later call with the same `state_uri`, by
    whomever, and with the same or a larger `count`, does not run it again. A task whose process dies is run again, so
    `fn` must write the same files again. The first error of `fn` is raised. Needs `connect` first.
    """
    import ray.data
    from ray.data.checkpoint import CheckpointConfig

    if not count:
        return []
    if pool is not None:
        require_room(1, pool.cpus, pool.gpus, training=True)
    results_uri = storage.join(state_uri, "results")
    done = _finished(results_uri)
    if len(done) < count:
        if done:
            say(f"{len(done)} of {count} units were finished before")
        units = ray.data.range(count, override_num_blocks=count)
        fs, checkpoint = storage.filesystem(storage.join(state_uri, "checkpoint"))
        units.context.checkpoint_config = CheckpointConfig(
            id_column="id", checkpoint_path=checkpoint, override_filesystem=fs, delete_checkpoint_on_success=False
        )
        with _progress(results_uri, count, say):
            _run(fn, units, results_uri, pool)
            done = _finished(results_uri)
            if lost := [{"id": number} for number in range(count) if number not in done]:
                # Ray keeps a unit's mark by renaming it, on S3 a copy and a deletion. Who dies in between leaves both names;
                # for the one Ray then removes the result, and for the other it does not run the unit again.
                _run(fn, ray.data.from_items(lost, override_num_blocks=len(lost)), results_uri, pool)
                done = _finished(results_uri)
    assert set(range(count)) <= set(done), f"{count - len(done)} of {count} units left no result"
    return [done[number] for number in range(count)]


def _run(fn: Callable, units: Any, results_uri: str, pool: Pool | None) -> None:
    """Writes the results of a dataset of units, each to a file of its own."""
    from ray.data import ActorPoolStrategy, SaveMode
    from ray.exceptions import RayTaskError

    fs, results = storage.filesystem(results_uri)
    if pool is None:
        mapped = units.map(_Unit(fn), **on_cpus())
    else:
        mapped = units.map(
            _StayingUnit,
            fn_constructor_args=(fn,),
            compute=ActorPoolStrategy(size=pool.processes),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus,
            **for_training(pool.gpus),
        )
    try:
        mapped.write_parquet(results, filesystem=fs, mode=SaveMode.APPEND, ray_remote_args=on_cpus())
    except RayTaskError as error:
        cause = error.cause
        cause.args = getattr(cause, "own_args", cause.args)
        raise cause from error


class _Unit:
    """A row of the dataset: the unit's number in, its number and its result out."""

    def __init__(self, fn: Callable[[int], dict[str, Any]]) -> None:
        self.fn = fn

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        number = int(row["id"])
        try:
            return {"id": number, "result": json.dumps(self.fn(number), allow_nan=False)}
        except Exception as error:
            error.own_args = error.args  # Ray appends advice on its own settings to them
            raise


class _StayingUnit(_Unit):
    """The same in a process of a pool. Its function is made for the first unit, where an error is one of the unit's."""

    def __init__(self, make: Callable[[], Callable[[int], dict[str, Any]]]) -> None:
        super().__init__(lambda number: self.made()(number))
        self.made = cache(make)


def _finished(uri: str) -> dict[int, dict[str, Any]]:
    """{number: result} of the units whose results are on storage, whole: a kill or a full disk can leave a part of a file."""
    fs, path = storage.filesystem(uri)

    def rows(name: str) -> list[dict[str, Any]]:
        try:
            return pq.read_table(f"{path}/{name}", filesystem=fs).to_pylist()
        except pa.ArrowInvalid:
            return []

    names = [name for name, _ in storage.list_files(uri) if name.endswith(".parquet")]
    with ThreadPoolExecutor(16) as threads:  # on S3 a request is all waiting
        return {row["id"]: json.loads(row["result"]) for found in threads.map(rows, names) for row in found}


@contextmanager
def _progress(uri: str, count: int, say: Callable[[str], None]) -> Iterator[None]:
    """Says now and then how many units are finished and how long the rest will take."""
    stop = threading.Event()

    def watch() -> None:
        before, started, said = len(storage.list_files(uri)), time.monotonic(), 0
        while not stop.wait(_PROGRESS_S):
            done = len(storage.list_files(uri))
            if done > max(before, said):
                left_s = (time.monotonic() - started) / (done - before) * (count - done)
                filled = round(20 * done / count)
                say(f"[{'#' * filled}{'.' * (20 - filled)}] {done}/{count} units, {left_s:.0f} s left")
                said = done

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
