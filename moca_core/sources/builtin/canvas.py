"""The one small canvas that plots are drawn on, and the looks that a plot can have."""

import io
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

PLOT_PX = (112, 112)  # 4 x 4 merged groups of patches at 28 px, 16 image tokens

_DPI = 72  # a point is a pixel
_PALETTES = (
    ("#1f77b4", "#d62728", "#2ca02c"), ("#6a3d9a", "#ff7f00", "#33a02c"), ("#08519c", "#e6550d", "#31a354"),
    ("#111111", "#e41a1c", "#377eb8"), ("#984ea3", "#4daf4a", "#a65628"), ("#e7298a", "#1b9e77", "#7570b3"),
)  # fmt: skip
_COLOUR_MAPS = ("viridis", "magma", "cividis", "plasma")
_DIVERGING_MAPS = ("coolwarm", "PuOr_r", "BrBG_r")
_MARKERS = ("o", "s", "^", "D", "v")


@dataclass(frozen=True)
class Look:
    """What differs between two drawings of the same rows."""

    colours: tuple[str, ...]
    marker: str
    marker_px: float
    line_px: float
    colour_map: str
    diverging_map: str
    paper: tuple[float, float, float]  # red, green, blue in 0..1


def random_look(rng: np.random.Generator) -> Look:
    palette = _PALETTES[rng.integers(len(_PALETTES))]
    return Look(
        colours=tuple(palette[i] for i in rng.permutation(len(palette))),
        marker=_MARKERS[rng.integers(len(_MARKERS))],
        marker_px=float(rng.uniform(3.0, 5.5)),
        line_px=float(rng.uniform(1.0, 2.5)),
        colour_map=_COLOUR_MAPS[rng.integers(len(_COLOUR_MAPS))],
        diverging_map=_DIVERGING_MAPS[rng.integers(len(_DIVERGING_MAPS))],
        paper=(float(rng.uniform(0.92, 1.0)), float(rng.uniform(0.92, 1.0)), float(rng.uniform(0.92, 1.0))),
    )


Kind = Callable[[Axes, np.ndarray, np.ndarray, Look], None]
"""How a kind of plot is drawn: (axes, sampled values [rows, columns], the rows' class labels [rows], look)."""


class Canvas:
    """One reusable figure: making a figure costs ten times as much as drawing on it."""

    def __init__(self) -> None:
        figure = Figure(figsize=(PLOT_PX[0] / _DPI, PLOT_PX[1] / _DPI), dpi=_DPI)
        self._agg = FigureCanvasAgg(figure)
        self._axes = figure.add_axes((0.06, 0.06, 0.88, 0.88), xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=[])
        self._axes.set_autoscale_on(False)
        self._lock = threading.Lock()

    def draw(self, kind: Kind, values: np.ndarray, labels: np.ndarray, look: Look) -> bytes:
        """One plot as PNG, 112 x 112 px, RGB."""
        with self._lock:
            self._axes.patch.set_facecolor(look.paper)
            kind(self._axes, values, labels, look)
            self._agg.draw()
            pixels = np.array(self._agg.buffer_rgba())[..., :3]
            for artist in (*self._axes.lines, *self._axes.collections, *self._axes.images):
                artist.remove()
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=6)
        return buffer.getvalue()
