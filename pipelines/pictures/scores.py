"""How good is it? Precision@1 of every task, beside chance."""

from pipelines.pictures.figure import SERIES, panels, png


def score_bars(scores: dict[str, dict[str, float]]) -> bytes:
    """PNG of precision@1 per task: one group of bars per task, chance as a line across it."""
    models = [name for name in next(iter(scores.values())) if name != "chance"]
    figure, ((panel,),) = panels(1, 1, width=2 + 2 * len(scores), height=3.6)
    width = 0.8 / len(models)
    for place, model in enumerate(models):
        positions = [task + (place - (len(models) - 1) / 2) * width for task in range(len(scores))]
        panel.bar(positions, [row[model] for row in scores.values()], width, label=model, color=SERIES[place])
    for task, row in enumerate(scores.values()):
        panel.hlines(
            row["chance"], task - 0.45, task + 0.45, colors="black", linestyles="dashed", label="chance" * (task == 0)
        )
    panel.set_xticks(range(len(scores)), list(scores))
    panel.set(ylabel="precision@1", ylim=(0, 1))
    panel.legend()
    return png(figure)
