"""What is each part worth, and what does more of it bring? Variants beside the whole method, and curves over an axis."""

from typing import TYPE_CHECKING

import numpy as np

from pipelines.pictures.figure import BLUE, ORANGE, SERIES, panels, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pipelines.studies.curves import Curve
    from pipelines.studies.losses import Losses
    from pipelines.studies.table import Line

STROKES = ("-", "--", ":")  # where there are more variants than colours


def variant_bars(lines: "list[Line]", chance: float | None) -> bytes:
    """PNG: a line for each variant, its mean with a bar of one deviation over seeds, every run as a dot; the first one's mean and chance
    as lines across."""
    figure, ((panel,),) = panels(1, 1, width=8, height=1.2 + 0.36 * len(lines))
    for place, line in enumerate(lines):
        scores = list(line.overall.by_seed.values())
        panel.scatter(scores, [place] * len(scores), s=14, color=ORANGE, zorder=2)
        panel.errorbar(line.overall.mean, place, xerr=line.overall.deviation, fmt="o", color=BLUE, capsize=4, zorder=3)
    panel.axvline(lines[0].overall.mean, color=BLUE, linewidth=0.8, linestyle="--")
    if chance is not None:
        panel.axvline(chance, color="black", linewidth=0.8, linestyle=":")
    panel.set_yticks(range(len(lines)), [line.variant.name for line in lines])
    panel.set(
        xlabel="score, mean over tasks" + (" (dotted: chance)" if chance is not None else ""),
        ylim=(len(lines) - 0.5, -0.5),
    )
    _plain(panel, "x")
    return png(figure)


def curve_panels(title: str, curves: "dict[str, Curve]", start: float | None = None) -> bytes:
    """PNG: a panel for each curve with the mean and one deviation at each place, every run as a dot, and the fitted line. `start` is the
    score at 0, as a line across."""
    figure, (places,) = panels(1, len(curves), width=max(6.0, 3.6 * len(curves) + 0.6), height=3.6)
    for panel, (name, curve) in zip(places, curves.items(), strict=True):
        xs = list(curve.points)
        for x, scores in curve.points.items():
            panel.scatter([x] * len(scores), scores, s=12, color=ORANGE, zorder=2)
        means = [np.mean(scores) for scores in curve.points.values()]
        bars = [np.std(scores, ddof=1) if len(scores) > 1 else 0.0 for scores in curve.points.values()]
        panel.errorbar(xs, means, yerr=bars, fmt="o", color=BLUE, capsize=3, zorder=3)
        if found := curve.fit:
            over = np.geomspace(xs[0], xs[-1], 50)
            panel.plot(over, found.at_1 + found.per_doubling.mean * np.log2(over), color=BLUE, linewidth=1)
        if start is not None:
            panel.axhline(start, color="black", linewidth=0.8, linestyle=":")
        panel.set_xscale("log", base=2)
        # names nearer than this would touch
        named = [x for x, after in zip(xs, [*xs[1:], np.inf], strict=True) if after > 1.15 * x]
        panel.set_xticks(named, [f"{x:g}" for x in named], rotation=45, minor=False)
        panel.set(title=name, xlabel=curve.label)
        _plain(panel, "y")
    figure.suptitle(title)
    return png(figure)


def loss_panels(losses: "Losses") -> bytes:
    """PNG: a panel for each loss, a line for each run over the tokens seen, the runs of a variant alike."""
    from matplotlib.ticker import EngFormatter

    figure, places = panels(len(losses), 1, width=8, height=3.2 * len(losses))
    names = list(dict.fromkeys(name for variants in losses.values() for name in variants))
    drawn = {}
    for panel, (title, variants) in zip(places[:, 0], losses.items(), strict=True):
        for name, runs in variants.items():
            look = names.index(name)
            style = {"color": SERIES[look % len(SERIES)], "linestyle": STROKES[look // len(SERIES) % len(STROKES)]}
            for curve in runs:
                (drawn[name],) = panel.plot(*zip(*curve, strict=True), linewidth=1.2, **style)
        panel.set(title=title, xlabel="tokens seen")
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(drawn.values(), drawn.keys(), loc="outside right upper", frameon=False, fontsize=8)
    return png(figure)


def _plain(panel: "Axes", axis: str) -> None:
    getattr(panel, f"{axis}axis").set_major_formatter(lambda value, _: f"{100 * value:.1f}")
    panel.grid(alpha=0.25, axis=axis)
    panel.spines[["top", "right"]].set_visible(False)
