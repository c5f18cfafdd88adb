"""Where did the time go? The parts of a training step over the run, and all of it in one bar."""

from pipelines.pictures.figure import BLUE, GREEN, ORANGE, PURPLE, SKY, panels, png
from pipelines.training.stopwatch import PARTS

COLOURS = dict(zip(PARTS, (ORANGE, BLUE, PURPLE, GREEN, SKY), strict=True))
MEANS = {
    "data": "waiting for data",
    "compute": "forward and backward",
    "communication": "communication",
    "optimizer": "optimizer",
    "between": "log, validation, checkpoints, pictures",
}


def shares_of_time(history: list[dict[str, float]]) -> dict[str, float]:
    """{part: its share of all steps' seconds}, from the rows that were logged, each a mean over the steps since the one before."""
    whole, spent, done = 0.0, dict.fromkeys(PARTS, 0.0), 0
    for row in history:
        seconds = row["step_s"] * (row["step"] + 1 - done)
        done, whole = row["step"] + 1, whole + seconds
        for part in PARTS:
            spent[part] += seconds * row[f"time/{part}"]
    return {part: value / whole for part, value in spent.items()}


def time_spent(title: str, history: list[dict[str, float]]) -> bytes:
    """PNG of the seconds of a step by part, stacked, over the steps; above them the shares of the whole run."""
    figure, ((bar,), (panel,)) = panels(2, 1, width=8, height=4.2, height_ratios=(1, 5))
    left = 0.0
    for part, share in shares_of_time(history).items():
        bar.barh([0], [share], left=left, color=COLOURS[part])
        if share > 0.04:
            ink = "white" if COLOURS[part] == BLUE else "black"
            bar.text(left + share / 2, 0, f"{share:.0%}", ha="center", va="center", fontsize=9, color=ink)
        left += share
    bar.set(xlim=(0, 1), xticks=[], yticks=[])
    bar.set_title(title, fontsize=11)
    bar.set_frame_on(False)
    edges = [0, *(row["step"] + 1 for row in history)]
    bottom = [0.0] * len(history)
    for part in PARTS:
        top = [low + row["step_s"] * row[f"time/{part}"] for low, row in zip(bottom, history, strict=True)]
        panel.stairs(top, edges, baseline=bottom, fill=True, color=COLOURS[part], label=MEANS[part])
        bottom = top
    panel.set(xlabel="steps", ylabel="seconds of a step", xlim=(0, edges[-1]))
    usual = max(bottom[1:], default=bottom[0])  # the first step waits for everything to start
    panel.set_ylim(0, min(max(bottom), 2 * usual) * 1.05)
    if bottom[0] > 2 * usual:
        panel.annotate(
            f"the first: {bottom[0]:.1f} s", (edges[1], 1.9 * usual), xytext=(4, 0), textcoords="offset points"
        )
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return png(figure)
