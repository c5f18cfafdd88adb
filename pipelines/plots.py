"""Plots where people would rather look than read."""

import io
from collections.abc import Sequence

from pipelines.mixture import Share


def loss_curves(
    title: str, history: list[dict[str, float]], names: list[str], validation: Sequence[dict[str, float]] = ()
) -> bytes:
    """PNG of every named loss over steps, each in a panel of its own, with that of what is held out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(names), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        panel.plot(
            [row["step"] + 1 for row in history], [row[name] for row in history], linewidth=1.5, label="training"
        )
        if validation:
            held_out = [row[f"validation/{name}"] for row in validation]
            panel.plot([row["step"] + 1 for row in validation], held_out, "o-", markersize=4, label="held out")
            panel.legend()
        panel.set(xlabel="step", ylabel=name)
        panel.grid(alpha=0.3)
    figure.suptitle(title)
    return _png(figure)


def score_bars(scores: dict[str, dict[str, float]]) -> bytes:
    """PNG of precision@1 per task: one group of bars per task, chance as a line across it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = [name for name in next(iter(scores.values())) if name != "chance"]
    figure = Figure(figsize=(2 + 2 * len(scores), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    width = 0.8 / len(models)
    for place, model in enumerate(models):
        positions = [task + (place - (len(models) - 1) / 2) * width for task in range(len(scores))]
        panel.bar(positions, [row[model] for row in scores.values()], width, label=model)
    for task, row in enumerate(scores.values()):
        panel.hlines(
            row["chance"], task - 0.45, task + 0.45, colors="black", linestyles="dashed", label="chance" * (task == 0)
        )
    panel.set_xticks(range(len(scores)), list(scores))
    panel.set(ylabel="precision@1", ylim=(0, 1))
    panel.legend()
    return _png(figure)


def mixture_bars(mixture: dict[str, dict[str, Share]]) -> bytes:
    """PNG of the tokens by source, those of text and of images end to end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    totals = {source: sum(names.values(), Share()) for source, names in reversed(mixture.items())}  # the first on top
    figure = Figure(figsize=(8, 1.2 + 0.35 * len(totals)), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    text = [share.tokens - share.image_tokens for share in totals.values()]
    panel.barh(list(totals), text, label="text")
    panel.barh(list(totals), [share.image_tokens for share in totals.values()], left=text, label="images")
    panel.set(xlabel="tokens after cleaning")
    panel.legend()
    return _png(figure)


def similarity_histograms(histograms: dict[str, tuple[Sequence[float], Sequence[float]]]) -> bytes:
    """PNG of how similar queries were to right answers and to negatives, a panel for each task. A task has the counts of both,
    in equal bins over [-1, 1]; either is drawn as shares of its own, over what range there is anything to see."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(4, len(histograms))
    lines = -(-len(histograms) // columns)
    figure = Figure(figsize=(3.4 * columns, 0.8 + 2.1 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(lines, columns, squeeze=False, sharex=True).flat)
    seen = []
    for panel, (task, kinds) in zip(panels, histograms.items(), strict=False):
        for counts, name, colour in zip(kinds, ("right answers", "negatives"), ("tab:blue", "tab:orange"), strict=True):
            edges = [2 * edge / len(counts) - 1 for edge in range(len(counts) + 1)]
            shares = [count / max(1.0, sum(counts)) for count in counts]
            panel.stairs(shares, edges, fill=True, alpha=0.45, color=colour, label=name)
            seen += [edges[place + side] for place, count in enumerate(counts) if count for side in (0, 1)]
        panel.set_title(task, fontsize=9)
        panel.set_yticks([])
    for panel in panels[len(histograms) :]:
        panel.set_axis_off()
    for panel in panels[max(0, len(histograms) - columns) : len(histograms)]:
        panel.set_xlabel("cosine similarity")
        panel.tick_params(labelbottom=True)
    panels[0].set_xlim(min(seen, default=-1), max(seen, default=1))
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside upper center", ncols=2)
    return _png(figure)


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
