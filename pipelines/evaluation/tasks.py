"""Evaluation tasks on storage, as the steps and the command share them: a folder with queries.parquet and candidates.parquet."""

import hashlib
from dataclasses import dataclass

from cluster import storage
from moca_core import benchmarks
from moca_core.benchmarks import PROMPTS, BenchmarkTask, Metric, Prompts
from moca_core.data.image_files import ImageBounds
from moca_core.data.schema import CANDIDATES, QUERIES, task_to_tables
from moca_core.data.validate import check_task
from moca_core.types import EvalTask
from pipelines.tables import table_writer

ROWS_PER_GROUP = 16
SIDES = ("queries", "candidates")


@dataclass(frozen=True)
class StoredTask:
    """`uri` is its folder; `metric` is what it is measured by."""

    name: str
    uri: str
    prompts: Prompts
    metric: Metric

    @staticmethod
    def of(name: str, uri: str, prompts: Prompts | None = None, metric: Metric = "precision_at_1") -> "StoredTask":
        """Without `prompts` those of the benchmark that has the task; `metric` is for a task that none has."""
        known = benchmarks.tasks().get(name)
        prompts = prompts or PROMPTS[known.prompts if known else "none"]
        return StoredTask(name, uri, prompts, known.metric if known else metric)

    @property
    def known(self) -> BenchmarkTask | None:
        """The task of a public benchmark that this is."""
        return benchmarks.tasks().get(self.name)

    def table(self, side: str) -> str:
        return storage.join(self.uri, f"{side}.parquet")

    def digest(self) -> str:
        """What is asked, and how: two tasks that differ in anything that a score depends on differ in this."""
        said = (self.name, self.prompts, storage.digest(self.uri))
        return hashlib.sha256(repr(said).encode()).hexdigest()


def write_task(task: EvalTask, uri: str, bounds: ImageBounds) -> dict[str, int]:
    """Checks a task and writes it to the folder `uri`; how many of both sides it has."""
    check_task(task, bounds)
    tables = zip(SIDES, (QUERIES, CANDIDATES), task_to_tables(task), strict=True)
    for side, schema, table in tables:
        with table_writer(storage.join(uri, f"{side}.parquet"), schema, ROWS_PER_GROUP) as writer:
            writer.write(table)
    return {"queries": len(task.queries), "candidates": len(task.candidates)}
