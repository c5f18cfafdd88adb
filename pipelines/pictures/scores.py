"""How good is it? Precision@1 of every task and model, beside chance."""

from collections.abc import Mapping

from pipelines.pictures.figure import SERIES, panels, png

SHAPES = "osD^vP*"  # colours alone do not tell models apart on paper


def score_dots(
    scores: Mapping[str, Mapping[str, float]], intervals: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None
) -> bytes:
    """PNG of {task: {"chance", model: precision@1}}: a line for each task, a mark for each model, chance as a dash. `intervals`
    {task: {model: {"low", "high"}}} are drawn as thin bars. One task or forty, of short names or long ones."""
    models = [name for name in next(iter(scores.values())) if name != "chance"]
    figure, ((panel,),) = panels(1, 1, width=8, height=1.3 + 0.42 * len(scores))
    lines = range(len(scores))
    panel.hlines(lines, 0, 1, colors="#dddddd", linewidth=0.8, zorder=0)
    for place, model in enumerate(models):
        shift = 0.5 * (place - (len(models) - 1) / 2) / len(models)
        heights = [line + shift for line in lines]
        style = {"color": SERIES[place % len(SERIES)], "marker": SHAPES[place % len(SHAPES)]}
        panel.scatter([row[model] for row in scores.values()], heights, s=42, label=model, zorder=3, **style)
        for height, task in zip(heights, scores, strict=True):
            if found := (intervals or {}).get(task, {}).get(model):
                panel.hlines(height, found["low"], found["high"], color=style["color"], linewidth=1.4, zorder=2)
    chance = [row["chance"] for row in scores.values()]
    panel.scatter(chance, list(lines), marker="|", s=220, color="black", label="chance", zorder=2)
    panel.set_yticks(list(lines), list(scores))
    panel.invert_yaxis()
    panel.set(xlabel="precision@1", xlim=(-0.02, 1.02), ylim=(len(scores) - 0.4, -0.6))
    panel.xaxis.set_major_formatter(_percent)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(axis="y", length=0)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside upper center", ncols=len(models) + 1, frameon=False)
    return png(figure)


def _percent(value: float, _: int) -> str:
    return f"{value:.0%}"
