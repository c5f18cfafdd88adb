"""What the results say of every variant: its mean, its spread over seeds, and whether it can be told from the whole method."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moca_core.significance import Interval, compare, holm, over_runs
from pipelines.evaluation.report import table
from pipelines.studies.collect import Result
from pipelines.studies.family import REFERENCE, Variant

BOUND = 0.05


@dataclass(frozen=True)
class Scores:
    """A variant's score by seed, over all tasks or on one. `differences` to the reference, of every seed that both have; `p_value` of
    the paired test on queries (each the mean over these seeds), adjusted for the number of tests in its table."""

    by_seed: dict[int, float]
    differences: tuple[float, ...] = ()
    p_value: float | None = None

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.by_seed.values())))

    @property
    def deviation(self) -> float | None:
        """Over seeds, of a sample."""
        return float(np.std(list(self.by_seed.values()), ddof=1)) if len(self.by_seed) > 1 else None

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


@dataclass(frozen=True)
class Line:
    """A variant, and what its training cost on average over seeds."""

    variant: Variant
    overall: Scores
    by_task: dict[str, Scores]
    tokens: float
    flops: float


def lines_of(variants: Sequence[Variant], results: Sequence[Result]) -> list[Line]:
    """Of the variants that have results, in their order."""
    found = {variant.name: [result for result in results if result.variant == variant.name] for variant in variants}
    found = {name: of_variant for name, of_variant in found.items() if of_variant}
    overall = adjusted({"": compared(found, list(results[0].values))})[""]
    by_task = adjusted({task: compared(found, [task]) for task in results[0].values})
    return [
        Line(
            variant,
            overall[variant.name],
            {task: column[variant.name] for task, column in by_task.items()},
            float(np.mean([result.tokens for result in found[variant.name]])),
            float(np.mean([result.flops for result in found[variant.name]])),
        )
        for variant in variants
        if variant.name in found
    ]


def compared(found: Mapping[str, Sequence[Result]], tasks: Sequence[str]) -> dict[str, Scores]:
    """Of every variant its means over `tasks`, beside the reference's; p-values as they are."""
    reference = {result.seed: result for result in found.get(REFERENCE, ())}
    columns = {}
    for name, results in found.items():
        paired = [] if name == REFERENCE else [result for result in results if result.seed in reference]
        whole = [reference[result.seed] for result in paired]
        columns[name] = Scores(
            {result.seed: score_on(result, tasks) for result in results},
            tuple(score_on(ours, tasks) - score_on(theirs, tasks) for ours, theirs in zip(paired, whole, strict=True)),
            compare(over_seeds(paired, tasks), over_seeds(whole, tasks)).p_value if paired else None,
        )
    return columns


def adjusted(columns: Mapping[str, dict[str, Scores]]) -> dict[str, dict[str, Scores]]:
    """The same with p-values for as many tests as there are in all columns together."""
    tests = [
        (key, name) for key, column in columns.items() for name, scores in column.items() if scores.p_value is not None
    ]
    p_values = holm([columns[key][name].p_value for key, name in tests])
    whole = {key: dict(column) for key, column in columns.items()}
    for (key, name), p_value in zip(tests, p_values, strict=True):
        whole[key][name] = replace(whole[key][name], p_value=p_value)
    return whole


def score_on(result: Result, tasks: Sequence[str]) -> float:
    return float(np.mean([result.by_task[task] for task in tasks]))


def over_seeds(results: Sequence[Result], tasks: Sequence[str]) -> list[np.ndarray]:
    """Of every task, the mean over runs of every query's value."""
    return [np.mean([result.values[task] for result in results], axis=0) for task in tasks]


def points(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{100 * value:{sign}.1f}"


def markdown(lines: Sequence[Line]) -> str:
    """Means with what they rest on; then task by task, with the deviation over seeds and whether it is told apart. In points."""
    rows = []
    for line in lines:
        scores = line.overall
        seen = scores.difference
        difference = f"{points(seen.mean, '+')} ({points(seen.low, '+')} to {points(seen.high, '+')})" if seen else ""
        p_value = "" if scores.p_value is None else f"{scores.p_value:.4f}"
        spread = [
            str(len(scores.by_seed)),
            points(scores.mean),
            points(scores.deviation),
            difference,
            p_value,
            scores.verdict,
        ]
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
    by_task = [[line.variant.name, *(cell(line.by_task[task]) for task in tasks)] for line in lines]
    return table([*head, "M tokens", "TFLOP"], rows) + "\n" + table(["variant", *tasks], by_task)


def cell(scores: Scores) -> str:
    spread = "" if scores.deviation is None else f" ± {points(scores.deviation)}"
    verdict = f" {scores.verdict}" if scores.verdict in ("better", "worse") else ""
    return points(scores.mean) + spread + verdict


def scores_csv(results: Sequence[Result]) -> bytes:
    """A line for every run and task."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["variant", "seed", "task", "mean", "queries", "tokens", "flops"])
    for result in results:
        for task, values in result.values.items():
            lines.writerow([result.variant, result.seed, task, values.mean(), len(values), result.tokens, result.flops])
    return text.getvalue().encode()
