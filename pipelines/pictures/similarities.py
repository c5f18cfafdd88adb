"""Can it tell? How similar queries are to right answers, and to negatives."""

from collections.abc import Sequence

from pipelines.pictures.figure import BLUE, ORANGE, panels, png

LEAST_RANGE = 0.3  # of the axis of similarities


def similarity_histograms(histograms: dict[str, tuple[Sequence[float], Sequence[float]]]) -> bytes:
    """PNG of how similar queries were to right answers and to negatives, a panel for each task. A task has the counts of both,
    in equal bins over [-1, 1]; either is drawn as shares of its own, over what range there is anything to see."""
    columns = min(4, len(histograms))
    lines = -(-len(histograms) // columns)
    figure, grid = panels(lines, columns, width=3.4 * columns, height=0.8 + 2.1 * lines, sharex=True)
    places = list(grid.flat)
    seen = []
    for panel, (task, kinds) in zip(places, histograms.items(), strict=False):
        for counts, name, colour in zip(kinds, ("right answers", "negatives"), (BLUE, ORANGE), strict=True):
            edges = [2 * edge / len(counts) - 1 for edge in range(len(counts) + 1)]
            shares = [count / max(1.0, sum(counts)) for count in counts]
            panel.stairs(shares, edges, fill=True, alpha=0.45, color=colour, label=name)
            seen += [edges[place + side] for place, count in enumerate(counts) if count for side in (0, 1)]
        panel.set_title(task, fontsize=9)
        panel.set_yticks([])
    for panel in places[len(histograms) :]:
        panel.set_axis_off()
    for panel in places[max(0, len(histograms) - columns) : len(histograms)]:
        panel.set_xlabel("cosine similarity")
        panel.tick_params(labelbottom=True)
    low, high = min(seen, default=-1), max(seen, default=1)
    room = max(0.0, LEAST_RANGE - (high - low)) / 2  # what has collapsed is seen to be narrow
    places[0].set_xlim(max(-1, low - room), min(1, high + room))
    figure.legend(*places[0].get_legend_handles_labels(), fontsize=8, loc="outside upper center", ncols=2)
    return png(figure)
