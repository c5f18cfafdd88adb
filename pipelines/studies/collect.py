"""What the runs of a study came to: scores query by query, and what training cost, off the records that they left."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster import storage
from pipelines.evaluation.tasks import StoredTask
from pipelines.runner.plan import Planned
from pipelines.studies.family import Run
from pipelines.tables import read_table

TRAINING = ("pretrain", "warmup", "finetune")


@dataclass(frozen=True)
class Result:
    """A finished run. `values` {task: a value per query}; `chance` of the same by ranking at random, where it is known; tokens and FLOPs
    of the training stages."""

    variant: str
    seed: int
    values: dict[str, np.ndarray]
    chance: float | None
    tokens: int
    flops: float

    @property
    def by_task(self) -> dict[str, float]:
        return {task: float(values.mean()) for task, values in self.values.items()}

    @property
    def score(self) -> float:
        """The mean over tasks."""
        return float(np.mean(list(self.by_task.values())))


def result_of(run: Run, plan: Sequence[Planned], metric: str | None = None) -> Result | None:
    """By one metric for all tasks, or by each task's main one. None while the run is not finished."""
    (evaluate,) = (planned for planned in plan if planned.step.name == "evaluate")
    if evaluate.done is None:
        return None
    (paths,) = evaluate.done.result["rankings"].values()  # of the finished model alone
    values, chances = {}, []
    for task, path in paths.items():
        by = metric or StoredTask.of(task, "").metric
        table = read_table(storage.join(evaluate.uri, path), columns=[by, "chance"])
        values[task] = table[by].to_numpy()
        chances.append(table["chance"].to_numpy().mean())
    trained = [planned.done.result for planned in plan if planned.step.name in TRAINING and planned.done]
    return Result(
        run.variant.name,
        run.seed,
        values,
        None if metric else float(np.mean(chances)),
        sum(stage["tokens_seen"] for stage in trained),
        sum(stage["flops"] for stage in trained),
    )
