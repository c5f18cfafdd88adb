"""pairs: raw pairs of any layout to validated PairSets, one per task, and the held-out evaluation tasks."""

import posixpath
from collections import Counter
from dataclasses import dataclass
from functools import partial

from cluster import storage
from moca_core import sources
from moca_core.data.images import ImageBounds
from moca_core.data.schema import (
    CANDIDATES,
    PAIRS,
    QUERIES,
    pairs_to_table,
    task_to_tables,
)
from moca_core.data.validate import check_task, valid_pairs
from moca_core.types import Pair, Rejected
from pipelines.rejections import check_fraction, check_rejected, write_rejected
from pipelines.runner.step import Context, Step
from pipelines.sources import Source, check_layouts
from pipelines.tables import table_writer

ROWS_PER_GROUP = 16


@dataclass(frozen=True)
class PairsConfig:
    """Pairs to train on, and tasks to evaluate on."""

    train: tuple[Source, ...]
    evaluate: tuple[Source, ...]
    bounds: ImageBounds = ImageBounds()
    max_rejected_fraction: float = 0.2

    def __post_init__(self) -> None:
        check_layouts("pairs.train", self.train, sources.PAIRS)
        check_layouts("pairs.evaluate", self.evaluate, sources.TASKS)
        check_fraction("pairs.max_rejected_fraction", self.max_rejected_fraction)


def pairs_step(config: PairsConfig) -> Step:
    return Step("pairs", run, config)


def run(context: Context) -> dict:
    """Result: {"train": {task: [[path, pairs]]}, "tasks": {task: {"queries", "candidates", "path"}}, "rejected": {reason: count}}."""
    import ray.data

    config: PairsConfig = context.config
    units = []
    for source in config.train:
        adapter = source.adapter(sources.PAIRS)
        units += [{"kind": "train", "source": source, "unit": unit} for unit in adapter.list_units(*source.open())]
    units += [{"kind": "evaluate", "source": source, "unit": {}} for source in config.evaluate]
    context.say(f"reading {len(units)} units")
    items = [{"number": number} for number in range(len(units))]
    dataset = ray.data.from_items(items, override_num_blocks=len(units))
    dataset = dataset.map(partial(read_unit, units=units, bounds=config.bounds, uri=context.uri))
    train: dict[str, list] = {}
    tasks: dict[str, dict] = {}
    rejected: Counter[str] = Counter()
    for done, row in enumerate(dataset.iter_rows(), 1):
        for name, file, rows, candidates in zip(
            row["names"], row["files"], row["rows"], row["candidates"], strict=True
        ):
            if candidates and name in tasks:
                raise ValueError(f"two evaluation tasks are called {name}; rename a file or its folder")
            if candidates:
                tasks[name] = {"path": file, "queries": rows, "candidates": candidates}
            else:
                train.setdefault(name, []).append([file, rows])
        rejected.update(dict(zip(row["reasons"], row["reason_counts"], strict=True)))
        if done % max(1, len(units) // 4) == 0:
            context.say(f"{done}/{len(units)} units")
    pairs = {name: sum(rows for _, rows in files) for name, files in sorted(train.items())}
    check_rejected("pairs", sum(pairs.values()), rejected, config.max_rejected_fraction)
    for name, count in pairs.items():
        context.say(f"{name}: {count} pairs")
    for name, task in sorted(tasks.items()):
        context.say(f"{name}: {task['queries']} queries, {task['candidates']} candidates held out")
    context.run.log_metrics({f"pairs/{name}": count for name, count in pairs.items()})
    context.run.log_metrics({"rejected": sum(rejected.values())})
    for role, given in (("train", config.train), ("evaluate", config.evaluate)):
        for source in given:
            context.run.log_dataset(
                f"{source.layout}-{role}", source.path or "builtin", source.identity()["content"], role
            )
    return {
        "train": dict(sorted(train.items())),
        "rows_per_group": ROWS_PER_GROUP,
        "tasks": dict(sorted(tasks.items())),
        "rejected": dict(sorted(rejected.items())),
    }


def read_unit(item: dict, *, units: list[dict], bounds: ImageBounds, uri: str) -> dict:
    unit = units[item["number"]]
    reader = read_train if unit["kind"] == "train" else read_tasks
    return reader(item["number"], unit["source"], unit["unit"], bounds, uri)


def read_train(number: int, source: Source, unit: dict, bounds: ImageBounds, uri: str) -> dict:
    """The pairs of one unit, in one file per task; what was rejected in a file beside them."""
    fs, _ = source.open()
    by_task: dict[str, list[Pair]] = {}
    rejected: list[Rejected] = []
    for entry in valid_pairs(source.adapter(sources.PAIRS).read_pairs(fs, unit), bounds):
        if isinstance(entry, Rejected):
            rejected.append(entry)
        else:
            by_task.setdefault(entry.source, []).append(entry)
    files = []
    for name, pairs in by_task.items():
        files.append(f"train/{name}/part-{number:05d}.parquet")
        with table_writer(storage.join(uri, files[-1]), PAIRS, ROWS_PER_GROUP) as writer:
            writer.write(pairs_to_table(pairs))
    return {
        "names": list(by_task),
        "files": files,
        "rows": [len(pairs) for pairs in by_task.values()],
        "candidates": [0] * len(by_task),
        **write_rejected(uri, number, rejected),
    }


def read_tasks(number: int, source: Source, unit: dict, bounds: ImageBounds, uri: str) -> dict:
    """The evaluation tasks of a source, each as a table of queries and one of candidates."""
    names, files, queries, candidates = [], [], [], []
    for task in source.adapter(sources.TASKS).read_tasks(*source.open()):
        check_task(task, bounds)
        folder = posixpath.join("tasks", task.name)
        for part, schema, table in zip(
            ("queries", "candidates"), (QUERIES, CANDIDATES), task_to_tables(task), strict=True
        ):
            with table_writer(storage.join(uri, folder, f"{part}.parquet"), schema, ROWS_PER_GROUP) as writer:
                writer.write(table)
        names.append(task.name)
        files.append(folder)
        queries.append(len(task.queries))
        candidates.append(len(task.candidates))
    nothing_rejected = write_rejected(uri, number, [])
    return {"names": names, "files": files, "rows": queries, "candidates": candidates, **nothing_rejected}
