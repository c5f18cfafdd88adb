"""How sure a mean is: over queries a bootstrap interval, and a paired test of two models; over seeds Student's interval.

Those over queries take values by task and speak of the mean over tasks of their means over queries, as benchmarks average; a single
task is a list of one. Queries are drawn within their task, and the tasks are given: the answer is about these tasks and other queries.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from moca_core.rng import generator

DRAWS = 10_000
CONFIDENCE = 0.95
_HELD_VALUES = 2**22  # drawn at a time


@dataclass(frozen=True)
class Interval:
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """By how much one is above the other, and how often a difference as large comes by chance."""

    difference: Interval
    p_value: float


def interval(values: Sequence[np.ndarray], seed: int = 0) -> Interval:
    """Percentile bootstrap of the mean, with a probability of `CONFIDENCE`. values: of every task, one per query."""
    mean = float(np.mean([task.mean() for task in values]))
    tail = 100 * (1 - CONFIDENCE) / 2

    def redrawn(rng: np.random.Generator, task: np.ndarray, draws: int) -> np.ndarray:
        return task[rng.integers(0, len(task), (draws, len(task)))].mean(axis=1)

    low, high = np.percentile(_draw(redrawn, values, seed, "bootstrap"), (tail, 100 - tail))
    return Interval(mean, float(low), float(high))


def compare(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], seed: int = 0) -> Comparison:
    """Two models on the same queries: `ours` minus `theirs`, tested by flipping the signs of the queries' differences.

    If neither model were better, either sign of a query's difference would be as likely. All patterns of signs are counted where
    they are no more than `DRAWS`, else so many are drawn, and the pattern that was seen counts as one of them.
    """
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    seen = abs(np.mean([task.mean() for task in differences])) - 1e-12  # rounding makes nothing rarer
    queries = sum(map(len, differences))
    if 2**queries <= DRAWS:
        signs = 1.0 - 2 * (np.arange(2**queries)[:, None] >> np.arange(queries) & 1)
        weights = np.concatenate([task / len(task) for task in differences]) / len(differences)
        p_value = float(np.mean(np.abs(signs @ weights) >= seen))
    else:

        def flipped(rng: np.random.Generator, task: np.ndarray, draws: int) -> np.ndarray:
            return (1.0 - 2 * rng.integers(0, 2, (draws, len(task)), dtype=np.int8)) @ task / len(task)

        extreme = np.abs(_draw(flipped, differences, seed, "signs")) >= seen
        p_value = float((1 + extreme.sum()) / (1 + DRAWS))
    return Comparison(interval(differences, seed), p_value)


def over_runs(values: Sequence[float]) -> Interval:
    """The mean over runs that differ in their seed, with Student's interval at `CONFIDENCE`. Two runs at least."""
    from scipy.stats import t

    assert len(values) > 1, "one run says nothing of its spread"
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / len(values) ** 0.5
    reach = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * error
    return Interval(mean, mean - reach, mean + reach)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values of a family of tests, adjusted so that one below a bound is as rare in the whole family as the bound says (Holm, 1979)."""
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(np.argsort(p_values, kind="stable").tolist()):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = least
    return adjusted


def _draw(
    draw: Callable[[np.random.Generator, np.ndarray, int], np.ndarray], tasks: Sequence[np.ndarray], seed: int, key: str
) -> np.ndarray:
    """[DRAWS] means over tasks; few enough values are drawn at a time to hold them."""
    total = np.zeros(DRAWS)
    for number, task in enumerate(tasks):
        rng, step = generator(seed, key, number), max(1, _HELD_VALUES // len(task))
        for first in range(0, DRAWS, step):
            total[first : first + step] += draw(rng, task, len(total[first : first + step]))
    return total / len(tasks)
