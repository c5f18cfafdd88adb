"""Is it learning? The losses by their parts over the tokens seen, of training and of what is held out."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipelines.pictures.figure import BLUE, GREEN, ORANGE, PURPLE, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def loss_curves(
    title: str, history: list[dict[str, float]], names: list[str], validation: Sequence[dict[str, float]] = ()
) -> bytes:
    """PNG of every named loss, each in a panel of its own, with that of what is held out; learning rate and gradient norm below.

    Rows hold step and tokens_seen, which are the axes below and above.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 4.2 * len(names)), 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1, height_ratios=(2.4, 1))
    tokens = [row["tokens_seen"] for row in history]
    losses = above.subplots(1, len(names), squeeze=False)[0]
    for panel, name in zip(losses, names, strict=True):
        panel.plot(tokens, [row[name] for row in history], linewidth=1.6, label="training", color=BLUE)
        if validation:
            seen, held_out = ([row[key] for row in validation] for key in ("tokens_seen", f"validation/{name}"))
            panel.plot(seen, held_out, "o-", markersize=4.5, label="held out", color=ORANGE)
            panel.legend(frameon=False)
        panel.set_title(name)
        _over_tokens(panel)
        _steps_above(panel, history)
    small = below.subplots(1, 2)
    for panel, name, colour in zip(small, ("learning_rate", "grad_norm"), (GREEN, PURPLE), strict=True):
        panel.plot(tokens, [row[name] for row in history], linewidth=1.2, color=colour)
        panel.set_title(name.replace("_", " ").replace("grad ", "gradient "), fontsize=9)
        panel.tick_params(labelsize=8)
        panel.set_ylim(bottom=0)
        _over_tokens(panel, label=False)
    figure.suptitle(title)
    return png(figure)


def _over_tokens(panel: "Axes", *, label: bool = True) -> None:
    from matplotlib.ticker import EngFormatter

    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.locator_params(axis="x", nbins=5)
    panel.grid(alpha=0.25)
    panel.spines[["right"]].set_visible(False)
    if label:
        panel.set_xlabel("tokens seen")


def _steps_above(panel: "Axes", history: list[dict[str, float]]) -> None:
    """A second axis: batches differ in tokens, so steps are read off the rows."""
    tokens, steps = [0.0, *(row["tokens_seen"] for row in history)], [0.0, *(row["step"] + 1 for row in history)]
    axis = panel.secondary_xaxis(
        "top", functions=(lambda x: np.interp(x, tokens, steps), lambda x: np.interp(x, steps, tokens))
    )
    axis.set_xlabel("steps", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.locator_params(axis="x", nbins=5)
