"""What all figures share: a panel or several without a window behind them, colours that everybody tells apart, PNG."""

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

# Okabe and Ito (2008): distinct also to those who do not see red or green.
BLUE, ORANGE, GREEN, YELLOW, SKY, VERMILION, PURPLE = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#F0E442",
    "#56B4E9",
    "#D55E00",
    "#CC79A7",
)
SERIES = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, YELLOW)
DPI = 110


def panels(lines: int, columns: int, *, width: float, height: float, **options: object) -> "tuple[Figure, np.ndarray]":
    """A figure of `width` x `height` inches and its panels [lines, columns]; `options` as in matplotlib's `subplots`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(lines, columns, squeeze=False, **options)


def png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
