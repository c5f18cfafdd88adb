"""Kinds of plots, each a few matplotlib artists in the unit square.

Every kind takes the sampled `values` [rows, columns of the combination], the rows' `labels` and a Look. There is no
text in a picture: at this size it could not be read. Pyplot and autoscaling are bypassed: they cost more than drawing.
"""

from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection

from moca_core.sources.builtin.canvas import Kind, Look


def _scatter(axes: Axes, values: np.ndarray, labels: np.ndarray, look: Look) -> None:
    _points(axes, _unit(values[:, 0]), _unit(values[:, 1]), look, look.colours[0])


def _scatter_by_class(axes: Axes, values: np.ndarray, labels: np.ndarray, look: Look) -> None:
    x, y = _unit(values[:, 0]), _unit(values[:, 1])
    for label in np.unique(labels):
        _points(axes, x[labels == label], y[labels == label], look, look.colours[label])


def _scatter_with_line(axes: Axes, values: np.ndarray, labels: np.ndarray, look: Look) -> None:
    x, y = _unit(values[:, 0]), _unit(values[:, 1])
    _points(axes, x, y, look, look.colours[0])
    slope, offset = np.polyfit(x, y, 1)
    axes.plot([0, 1], [offset, offset + slope], color=look.colours[1], linewidth=look.line_px + 1)


def _bubbles(axes: Axes, values: np.ndarray, labels: np.ndarray, look: Look) -> None:
    x, y, size = (_unit(values[:, i]) for i in range(3))
    turn = np.linspace(0, 2 * np.pi, 16)
    circle = np.stack([np.cos(turn), np.sin(turn)], axis=-1)
    outlines = np.stack([x, y], axis=-1)[:, None] + circle * (0.01 + 0.09 * size**2)[:, None, None]
    axes.add_collection(PolyCollection(list(outlines), facecolors=look.colours[0], edgecolors="white", alpha=0.7))


def _histogram(axes: Axes, values: np.ndarray, labels: np.ndarray, look: Look) -> None:
    counts, _ = np.histogram(values[:, 0], bins=14)
    _bars(axes, counts / counts.max(), [look.colours[0]])


def _histogram_by_class(axes: Axes, values: np.ndarray, labels: np.ndarray, look: Look) -> None:
    edges = np.histogram_bin_edges(values[:, 0], bins=18)
    counts = [np.histogram(values[labels == label, 0], bins=edges)[0] for label in np.unique(labels)]
    x = np.repeat(np.linspace(0.03, 0.97, len(edges)), 2)[1:-1]
    for count, colour in zip(counts, look.colours, strict=False):
        height = 0.03 + 0.92 * np.repeat(count / max(map(np.max, counts)), 2)
        axes.fill_between(x, 0.03, height, color=colour, alpha=0.55, linewidth=0)


def _group_means(axes: Axes, values: np.ndarray, labels: np.ndarray, look: Look) -> None:
    """Bars: the first column is cut into fifths, a bar is the mean of the second column in one of them."""
    fifths = np.array_split(values[np.argsort(values[:, 0], kind="stable"), 1], 5)
    means = np.array([fifth.mean() for fifth in fifths])
    _bars(axes, means / means.max(), [look.colours[0]])


def _class_means(axes: Axes, values: np.ndarray, labels: np.ndarray, look: Look) -> None:
    """Grouped bars: for every column, the mean of every class."""
    means = np.stack([values[labels == label].mean(axis=0) for label in np.unique(labels)], axis=-1)
    heights = np.pad(means / means.max(axis=1, keepdims=True), ((0, 0), (0, 1))).ravel()[:-1]  # a gap between groups
    _bars(axes, heights, [*look.colours[: means.shape[1]], "white"])


def _sorted_curve(axes: Axes, values: np.ndarray, labels: np.ndarray, look: Look) -> None:
    y = np.sort(_unit(values[:, 0]))
    axes.plot(np.linspace(0.04, 0.96, len(y)), y, color=look.colours[0], linewidth=look.line_px + 1)


def _cumulative(axes: Axes, values: np.ndarray, labels: np.ndarray, look: Look) -> None:
    x = np.sort(_unit(values[:, 0]))
    axes.fill_between(x, 0.03, np.linspace(0.03, 0.97, len(x)), color=look.colours[0], linewidth=0)


def _stems(axes: Axes, values: np.ndarray, labels: np.ndarray, look: Look) -> None:
    y = _unit(values[:, 0])
    x = np.linspace(0.05, 0.95, len(y))
    lines = np.stack([np.stack([x, np.full_like(x, 0.03)], -1), np.stack([x, y], -1)], axis=1)
    axes.add_collection(LineCollection(list(lines), colors=look.colours[0], linewidths=look.line_px))
    _points(axes, x, y, look, look.colours[0])


def _row_line(axes: Axes, values: np.ndarray, labels: np.ndarray, look: Look) -> None:
    y = _unit(values[:, 0])
    axes.plot(np.linspace(0.04, 0.96, len(y)), y, color=look.colours[0], linewidth=look.line_px)


def _boxes(axes: Axes, values: np.ndarray, labels: np.ndarray, look: Look) -> None:
    y = _unit(values[:, 0])
    width = 1 / (labels.max() + 1)
    for label in np.unique(labels):
        low, first, middle, third, high = np.percentile(y[labels == label], (2, 25, 50, 75, 98))
        left, centre, right = ((label + share) * width for share in (0.2, 0.5, 0.8))
        box = [(left, first), (right, first), (right, third), (left, third)]
        axes.add_collection(PolyCollection([box], facecolors=look.colours[label], edgecolors="black"))
        strokes = [
            [(centre, low), (centre, first)],
            [(centre, third), (centre, high)],
            [(left, middle), (right, middle)],
        ]
        axes.add_collection(LineCollection(strokes, colors="black", linewidths=look.line_px))


def _violins(axes: Axes, values: np.ndarray, labels: np.ndarray, look: Look) -> None:
    y, grid = _unit(values[:, 0]), np.linspace(0.02, 0.98, 40)
    width = 1 / (labels.max() + 1)
    for label in np.unique(labels):
        density = np.exp(-0.5 * ((grid[:, None] - y[labels == label]) / 0.05) ** 2).sum(axis=1)
        half = 0.45 * width * density / density.max()
        axes.fill_betweenx(grid, (label + 0.5) * width - half, (label + 0.5) * width + half, color=look.colours[label])


def _density(axes: Axes, values: np.ndarray, labels: np.ndarray, look: Look) -> None:
    counts, _, _ = np.histogram2d(_unit(values[:, 1]), _unit(values[:, 0]), bins=9, range=((0, 1), (0, 1)))
    axes.imshow(
        counts, cmap=look.colour_map, extent=(0, 1, 0, 1), origin="lower", aspect="auto", interpolation="nearest"
    )


def _correlation(axes: Axes, values: np.ndarray, labels: np.ndarray, look: Look) -> None:
    matrix = np.corrcoef(values, rowvar=False)
    axes.imshow(
        matrix, cmap=look.diverging_map, vmin=-1, vmax=1, extent=(0, 1, 0, 1), aspect="auto", interpolation="nearest"
    )


def _parallel(axes: Axes, values: np.ndarray, labels: np.ndarray, look: Look) -> None:
    x = np.linspace(0.04, 0.96, values.shape[1])
    heights = np.stack([_unit(column) for column in values.T], axis=-1)
    for label in np.unique(labels):
        lines = [np.stack([x, row], axis=-1) for row in heights[labels == label][:25]]
        axes.add_collection(LineCollection(lines, colors=look.colours[label], linewidths=look.line_px * 0.6))


def _shares(axes: Axes, values: np.ndarray, labels: np.ndarray, look: Look) -> None:
    """A pie of how many rows each class has."""
    ends = 0.25 + np.concatenate([[0], np.cumsum(np.bincount(labels))]) / len(labels)
    wedges = []
    for start, end in pairwise(ends):
        turn = 2 * np.pi * np.linspace(start, end, 30)
        arc = np.stack([0.5 + 0.44 * np.cos(turn), 0.5 + 0.44 * np.sin(turn)], axis=-1)
        wedges.append(np.concatenate([[(0.5, 0.5)], arc]))
    axes.add_collection(PolyCollection(wedges, facecolors=look.colours, edgecolors="white"))


def _radar(axes: Axes, values: np.ndarray, labels: np.ndarray, look: Look) -> None:
    """Class means of all columns around a circle."""
    heights = np.stack([_unit(column) for column in values.T], axis=-1)
    turn = 2 * np.pi * np.arange(values.shape[1] + 1) / values.shape[1]
    spokes = np.stack([np.cos(turn), np.sin(turn)], axis=-1)
    for label in np.unique(labels):
        mean = heights[labels == label].mean(axis=0)
        outline = 0.5 + 0.62 * np.append(mean, mean[0])[:, None] * spokes
        axes.add_collection(PolyCollection([outline], facecolors="none", edgecolors=look.colours[label], linewidths=2))
    rays = [[(0.5, 0.5), tuple(0.5 + 0.45 * spoke)] for spoke in spokes]
    axes.add_collection(LineCollection(rays, colors="#999999", linewidths=0.5))


def _unit(column: np.ndarray) -> np.ndarray:
    """Scaled to what is inside the frame."""
    low, high = column.min(), column.max()
    return 0.05 + 0.9 * (column - low) / (high - low if high > low else 1.0)


def _points(axes: Axes, x: np.ndarray, y: np.ndarray, look: Look, colour: str) -> None:
    axes.plot(x, y, linestyle="none", marker=look.marker, markersize=look.marker_px, color=colour, markeredgewidth=0)


def _bars(axes: Axes, heights: np.ndarray, colours: list[str]) -> None:
    """Side by side from left to right; `heights` in 0..1; colours repeat."""
    left = np.linspace(0.03, 0.97, len(heights) + 1)
    outlines = [
        [(a, 0.03), (b, 0.03), (b, 0.03 + 0.92 * height), (a, 0.03 + 0.92 * height)]
        for a, b, height in zip(left[:-1], left[1:], heights, strict=True)
    ]
    axes.add_collection(PolyCollection(outlines, facecolors=colours, edgecolors="white", linewidths=0.8))


KINDS: dict[str, Kind] = {
    "scatter": _scatter,
    "scatter_by_class": _scatter_by_class,
    "scatter_with_line": _scatter_with_line,
    "bubbles": _bubbles,
    "histogram": _histogram,
    "histogram_by_class": _histogram_by_class,
    "group_means": _group_means,
    "class_means": _class_means,
    "sorted_curve": _sorted_curve,
    "cumulative": _cumulative,
    "stems": _stems,
    "row_line": _row_line,
    "boxes": _boxes,
    "violins": _violins,
    "density": _density,
    "correlation": _correlation,
    "parallel": _parallel,
    "shares": _shares,
    "radar": _radar,
}
