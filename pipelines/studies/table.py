"""What the results say of every variant: its mean, its spread over seeds, and whether it can be told from the whole method."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moca_core.significance import Interval, compare, holm, over_runs
from pipelines.evaluation.report import table
from pipelines.studies.collect import Result
from pipelines.studies.family import REFERENCE, Variant

BOUND = 0.05


@dataclass(frozen=True)
class Line:
    """A variant. `scores` by seed; `differences` to the reference, of every seed that both have; `p_value` of the paired test on queries
    (each the mean over these seeds), adjusted for the number of variants."""

    variant: Variant
    scores: dict[int, float]
    by_task: dict[str, float]
    tokens: float
    flops: float
    differences: tuple[float, ...] = ()
    p_value: float | None = None

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.scores.values())))

    @property
    def deviation(self) -> float | None:
        """Over seeds, of a sample."""
        return float(np.std(list(self.scores.values()), ddof=1)) if len(self.scores) > 1 else None

    @property
    def difference(self) -> Interval | None:
        return over_runs(self.differences) if len(self.differences) > 1 else None

    @property
    def verdict(self) -> str:
        """A difference counts that is outside the spread over seeds and beyond chance over queries."""
        if self.difference is None or self.p_value is None:
            return ""
        outside = self.difference.low > 0 or self.difference.high < 0
        if not outside or self.p_value >= BOUND:
            return "not told apart"
        return "better" if self.difference.mean > 0 else "worse"


def lines_of(variants: Sequence[Variant], results: Sequence[Result]) -> list[Line]:
    """Of the variants that have results, in their order."""
    reference = {result.seed: result for result in results if result.variant == REFERENCE}
    lines, p_values = [], {}
    for variant in variants:
        found = [result for result in results if result.variant == variant.name]
        if not found:
            continue
        paired = [] if variant.name == REFERENCE else [r for r in found if r.seed in reference]
        if paired:
            whole = over_seeds([reference[result.seed] for result in paired])
            p_values[variant.name] = compare(over_seeds(paired), whole).p_value
        lines.append(
            Line(
                variant,
                {result.seed: result.score for result in found},
                {task: float(np.mean([r.by_task[task] for r in found])) for task in found[0].values},
                float(np.mean([r.tokens for r in found])),
                float(np.mean([r.flops for r in found])),
                tuple(result.score - reference[result.seed].score for result in paired),
            )
        )
    adjusted = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    return [replace(line, p_value=adjusted.get(line.variant.name)) for line in lines]


def over_seeds(results: Sequence[Result]) -> list[np.ndarray]:
    """Of every task, the mean over runs of every query's value."""
    return [np.mean([result.values[task] for result in results], axis=0) for task in results[0].values]


def points(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{100 * value:{sign}.1f}"


def markdown(lines: Sequence[Line]) -> str:
    """Means with what they rest on, and means by task, in points."""
    rows = []
    for line in lines:
        seen = line.difference
        difference = f"{points(seen.mean, '+')} ({points(seen.low, '+')} to {points(seen.high, '+')})" if seen else ""
        p_value = "" if line.p_value is None else f"{line.p_value:.4f}"
        spread = [str(len(line.scores)), points(line.mean), points(line.deviation), difference, p_value, line.verdict]
        rows.append([line.variant.name, *spread, f"{line.tokens / 1e6:.3g}", f"{line.flops / 1e12:.3g}"])
    head = [
        "variant",
        "seeds",
        "mean",
        "deviation",
        f"to {REFERENCE} (95 % over seeds)",
        "p over queries",
        "told apart",
    ]
    tasks = list(lines[0].by_task)
    by_task = [[line.variant.name, *(points(line.by_task[task]) for task in tasks)] for line in lines]
    return table([*head, "M tokens", "TFLOP"], rows) + "\n" + table(["variant", *tasks], by_task)


def scores_csv(results: Sequence[Result]) -> bytes:
    """A line for every run and task."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["variant", "seed", "task", "mean", "queries", "tokens", "flops"])
    for result in results:
        for task, values in result.values.items():
            lines.writerow([result.variant, result.seed, task, values.mean(), len(values), result.tokens, result.flops])
    return text.getvalue().encode()
