"""How the score grows along an axis of a scaling study: a line over the logarithm, and the paper's own curve."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moca_core.significance import CONFIDENCE, Interval
from pipelines.studies.collect import Result
from pipelines.studies.family import AXES, REFERENCE, Run

# arXiv 2506.23115, figure 3, read off the plot: MMEB precision@1 after contrastive learning, by steps of continual pre-training.
# All points of a size are checkpoints of one run, whose learning rate decays.
PAPER = {
    "MoCa-3B": {200: 65.7, 500: 66.0, 1000: 66.5, 1500: 66.7, 2000: 67.0, 2500: 67.2, 3000: 67.4, 3311: 67.5},
    "MoCa-7B": {200: 68.7, 500: 69.4, 1000: 69.8, 1500: 70.3, 2000: 70.7, 2500: 71.0, 3000: 71.4, 3311: 71.5},
}


@dataclass(frozen=True)
class Curve:
    """`points` {place on the axis: the score of every run}."""

    label: str
    points: dict[float, list[float]]

    @property
    def fit(self) -> "Fit | None":
        """None with less than three places: two always lie on a line."""
        return fit(self.points) if len(self.points) > 2 else None


@dataclass(frozen=True)
class Fit:
    """Least squares over all runs: score = at_1 + per_doubling * log2(place)."""

    at_1: float
    per_doubling: Interval


def fit(points: dict[float, list[float]]) -> Fit:
    from scipy.stats import linregress, t

    places = [place for place, scores in points.items() for _ in scores]
    line = linregress(np.log2(places), [score for scores in points.values() for score in scores])
    reach = float(t.ppf((1 + CONFIDENCE) / 2, len(places) - 2) * line.stderr)
    slope = float(line.slope)
    return Fit(float(line.intercept), Interval(slope, slope - reach, slope + reach))


def curves_of(runs: Sequence[Run], results: Sequence[Result]) -> dict[str, Curve]:
    """{axis: its curve}, of the axes with more than one place that has results."""
    recipes = {(run.variant.name, run.seed): run.recipe for run in runs}
    axis_of = {run.variant.name: run.variant.axis for run in runs}
    found = {}
    for axis, (label, place) in AXES.items():
        points: dict[float, list[float]] = {}
        for result in results:
            if axis_of[result.variant] == axis or result.variant == REFERENCE:
                points.setdefault(place(recipes[result.variant, result.seed]), []).append(result.score)
        if len(points) > 1:
            found[axis] = Curve(label, dict(sorted(points.items())))
    return found


def paper_curves() -> dict[str, Curve]:
    return {
        name: Curve("pre-training steps", {step: [score / 100] for step, score in points.items()})
        for name, points in PAPER.items()
    }


def fits_markdown(curves: dict[str, Curve]) -> str:
    lines = []
    for name, curve in curves.items():
        if curve.fit:
            p = curve.fit.per_doubling
            lines.append(
                f"- {name} ({curve.label}): {100 * p.mean:+.2f} points per doubling ({100 * p.low:+.2f} to {100 * p.high:+.2f})"
            )
    return "\n".join(lines) + "\n"
