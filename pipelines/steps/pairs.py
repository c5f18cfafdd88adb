"""pairs: raw pairs of any layout to validated PairSets, one per task, and the held-out evaluation tasks."""

import posixpath
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice

import pyarrow.compute as pc

from cluster import storage
from cluster.batch import run_units
from moca_core import sources
from moca_core.data.image_files import ImageBounds
from moca_core.data.keys import pair_key
from moca_core.data.schema import EVALUATION_KEYS, PAIRS, evaluation_keys_to_table, pairs_to_table
from moca_core.data.validate import valid_pairs
from moca_core.types import Pair, Rejected
from pipelines.evaluation.tasks import write_task
from pipelines.mixture import Part, Unit, read_mixture
from pipelines.pictures.counts import count_bars
from pipelines.rejections import LEAKED, check_fraction, check_rejected, quarantine
from pipelines.runner.step import Context, Step
from pipelines.sources import Source, check_layouts, check_mixture, targets
from pipelines.tables import TableWriter, read_table, table_writer

ROWS_PER_GROUP = 16
MAX_TASKS = 256  # open files of one unit


@dataclass(frozen=True)
class PairsConfig:
    """Pairs to train on, and tasks to evaluate on.

    `max_rows` is shared out by the training sources' weights; `seed` draws what is read of a source that is not read whole.
    `decontaminate` drops training pairs that are a question of an evaluation task with its right answer.
    """

    train: tuple[Source, ...]
    evaluate: tuple[Source, ...]
    max_rows: int | None = None
    seed: int = 0
    bounds: ImageBounds = ImageBounds()
    decontaminate: bool = True
    max_rejected_fraction: float = 0.2

    def __post_init__(self) -> None:
        check_layouts("pairs.train", self.train, sources.PAIRS)
        check_layouts("pairs.evaluate", self.evaluate, sources.TASKS)
        check_mixture("pairs", self.train, self.max_rows)
        check_mixture("pairs.evaluate", self.evaluate, None)
        if any(source.limit for source in self.evaluate):
            raise ValueError("pairs.evaluate: a limit would change what is scored; leave it out")
        check_fraction("pairs.max_rejected_fraction", self.max_rejected_fraction)


def pairs_step(config: PairsConfig) -> Step:
    return Step("pairs", run, config, code_version=6, resumable=True)


def run(context: Context) -> dict:
    """Result: {"train": {task: [[path, pairs]]}, "tasks": {task: {"queries", "candidates", "path"}}, "evaluation_keys": [path],
    "rejected": {reason: count}}."""
    config: PairsConfig = context.config
    tasks, keys = read_evaluation(context)
    listed = [source.adapter(sources.PAIRS).list_units(source.location()) for source in config.train]
    context.say(f"{sum(map(len, listed))} units in {len(listed)} source(s)")
    held_out = [context.path(file) for file in keys] if config.decontaminate else []

    def read(units: list[Unit]) -> list[dict]:
        task = partial(read_train, units=units, config=config, held_out=held_out, uri=context.uri)
        return run_units(task, len(units), state_uri=context.path("state", "train"), say=context.say)

    parts = read_mixture(listed, targets(config.train, config.max_rows), config.seed, read)
    rejected = sum((Counter(part.result["rejected"]) for part in parts), Counter())
    train: dict[str, list] = {}
    for name, file, rows in (item for part in parts for item in used_files(part)):
        train.setdefault(name, []).append([file, rows])
    pairs = {name: sum(rows for _, rows in files) for name, files in sorted(train.items())}
    for reason, count in rejected.most_common():
        context.say(f"rejected {count}: {reason}")
    context.keep("pairs.png", count_bars("training pairs by task, and refused", pairs, rejected))
    check_rejected("pairs", sum(pairs.values()), rejected, config.max_rejected_fraction)
    for name, count in pairs.items():
        context.say(f"{name}: {count} pairs, {count / sum(pairs.values()):.1%}")
    context.run.log_metrics({f"pairs/{name}": count for name, count in pairs.items()})
    context.run.log_metrics({"rejected": sum(rejected.values())})
    for role, given in (("train", config.train), ("evaluate", config.evaluate)):
        for source in given:
            identity = source.identity()["content"]
            context.run.log_dataset(f"{source.layout}-{role}", source.path or "builtin", identity, role)
    return {
        "train": dict(sorted(train.items())),
        "rows_per_group": ROWS_PER_GROUP,
        "tasks": tasks,
        "evaluation_keys": keys,
        "rejected": dict(sorted(rejected.items())),
    }


def read_evaluation(context: Context) -> tuple[dict[str, dict], list[str]]:
    """({task: {"path", "queries", "candidates"}}, tables of their keys)."""
    config: PairsConfig = context.config
    task = partial(read_tasks, config=config, uri=context.uri)
    results = run_units(task, len(config.evaluate), state_uri=context.path("state", "evaluate"), say=context.say)
    tasks: dict[str, dict] = {}
    for result in results:
        for name, found in result["tasks"].items():
            if name in tasks:
                raise ValueError(f"two evaluation tasks are called {name}; rename a file or its folder")
            tasks[name] = found
            context.say(f"{name}: {found['queries']} queries, {found['candidates']} candidates held out")
    return dict(sorted(tasks.items())), [result["keys"] for result in results]


def read_tasks(number: int, *, config: PairsConfig, uri: str) -> dict:
    """The evaluation tasks of a source, each as a table of queries and one of candidates; their keys in a table beside."""
    source = config.evaluate[number]
    keys_file, tasks = f"evaluation/part-{number:05d}.parquet", {}
    with table_writer(storage.join(uri, keys_file), EVALUATION_KEYS, None) as keys:
        for task in source.adapter(sources.TASKS).read_tasks(source.location()):
            folder = posixpath.join("tasks", task.name)
            counts = write_task(task, storage.join(uri, folder), config.bounds)
            keys.write(evaluation_keys_to_table(task))
            if task.name in tasks:
                raise ValueError(f"two evaluation tasks are called {task.name}; rename a file or its folder")
            tasks[task.name] = {"path": folder, **counts}
    return {"tasks": tasks, "keys": keys_file}


def read_train(number: int, *, units: list[Unit], config: PairsConfig, held_out: list[str], uri: str) -> dict:
    """The pairs of one unit, in one file per task; what was rejected in a file beside them."""
    unit = units[number]
    source = config.train[unit.source]
    tables = [read_table(file, filters=pc.field("kind") == "pair") for file in held_out]
    known = {key for table in tables for key in table["key"].to_pylist()}
    entries = valid_pairs(source.adapter(sources.PAIRS).read_pairs(source.location(), unit.unit), config.bounds)
    writers: dict[str, TableWriter] = {}
    with quarantine(uri, number) as aside, ExitStack() as files:
        for pair in islice(aside.sift(not_held_out(entries, known)), unit.limit):
            if pair.source not in writers:
                if len(writers) == MAX_TASKS:
                    raise ValueError(
                        f"{pair.where}: more than {MAX_TASKS} tasks in one file; give pairs fewer task names"
                    )
                target = storage.join(uri, task_file(pair.source, number))
                writers[pair.source] = files.enter_context(table_writer(target, PAIRS, ROWS_PER_GROUP))
            writers[pair.source].write(pairs_to_table([pair]))
    tasks = {name: writer.rows for name, writer in writers.items()}
    return {"rows": sum(tasks.values()), "tasks": tasks, "rejected": dict(aside.counts)}


def not_held_out(entries: Iterator[Pair | Rejected], known: set[bytes]) -> Iterator[Pair | Rejected]:
    """The same, with pairs that an evaluation task holds turned into rejections."""
    for entry in entries:
        if known and isinstance(entry, Pair) and any(pair_key(entry.query, p) in known for p in entry.positives):
            yield Rejected(LEAKED, "an evaluation task asks this and has this answer", entry.where)
        else:
            yield entry


def used_files(part: Part) -> Iterator[tuple[str, str, int]]:
    """(task, file, rows of it) of a part; what a limit cuts off is cut off every task alike, and no row more."""
    used, left = part.used, part.result["rows"]
    for name, rows in part.result["tasks"].items():
        if share := used * rows // left:
            yield name, task_file(name, part.number), share
        used, left = used - share, left - rows


def task_file(task: str, number: int) -> str:
    return f"train/{task}/part-{number:05d}.parquet"
