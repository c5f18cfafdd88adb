"""Is it learning? The losses by their parts, of training and of what is held out."""

from collections.abc import Sequence

from pipelines.pictures.figure import BLUE, ORANGE, panels, png


def loss_curves(
    title: str, history: list[dict[str, float]], names: list[str], validation: Sequence[dict[str, float]] = ()
) -> bytes:
    """PNG of every named loss over steps, each in a panel of its own, with that of what is held out."""
    figure, (line,) = panels(1, len(names), width=4.5 * len(names), height=3.2)
    for panel, name in zip(line, names, strict=True):
        steps = [row["step"] + 1 for row in history]
        panel.plot(steps, [row[name] for row in history], linewidth=1.5, label="training", color=BLUE)
        if validation:
            held_out = [row[f"validation/{name}"] for row in validation]
            places = [row["step"] + 1 for row in validation]
            panel.plot(places, held_out, "o-", markersize=4, label="held out", color=ORANGE)
            panel.legend()
        panel.set(xlabel="step", ylabel=name)
        panel.grid(alpha=0.3)
    figure.suptitle(title)
    return png(figure)
