"""How many of each? Bars with their numbers, for what was read, refused, taken out or found."""

from collections.abc import Mapping

from pipelines.pictures.figure import BLUE, ORANGE, panels, png


def count_bars(title: str, counts: Mapping[str, int], lost: Mapping[str, int] | None = None) -> bytes:
    """PNG of named counts, in their order; below them, in another colour, those of what was lost."""
    lost = {
        reason.replace("_", " "): count for reason, count in sorted((lost or {}).items(), key=lambda item: -item[1])
    }
    bars = [(name, count, BLUE) for name, count in counts.items()]
    bars += [(reason, count, ORANGE) for reason, count in lost.items()]
    figure, ((panel,),) = panels(1, 1, width=8, height=0.8 + 0.32 * max(2, len(bars)))
    places = range(len(bars))
    panel.barh(places, [count for _, count, _ in bars], color=[colour for _, _, colour in bars])
    for place, (_, count, _) in zip(places, bars, strict=True):
        panel.annotate(f"{count:,}", (count, place), (4, 0), textcoords="offset points", va="center")
    panel.set_yticks(places, [name for name, _, _ in bars])
    panel.set_xticks([])
    panel.set_xlim(0, 1.12 * max([1, *(count for _, count, _ in bars)]))
    panel.invert_yaxis()
    panel.set_title(title, fontsize=11)
    panel.spines[["top", "right", "bottom"]].set_visible(False)
    return png(figure)
