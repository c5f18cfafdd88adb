"""What does it learn from? The tokens of every source."""

from pipelines.mixture import Share, most
from pipelines.pictures.figure import BLUE, ORANGE, panels, png


def mixture_bars(mixture: dict[str, dict[str, Share]]) -> bytes:
    """PNG of the tokens by source, those of text and of images end to end. Of a single source: by the names in it."""
    from matplotlib.ticker import EngFormatter

    totals = {source: sum(names.values(), Share()) for source, names in mixture.items()}
    if len(mixture) == 1:
        totals = dict(most(*mixture.values()))
    whole = max(1, sum(share.tokens for share in totals.values()))
    figure, ((panel,),) = panels(1, 1, width=8, height=1.2 + 0.35 * len(totals))
    names, text = list(totals), [share.tokens - share.image_tokens for share in totals.values()]
    panel.barh(names, text, label="text", color=BLUE)
    images = [share.image_tokens for share in totals.values()]
    panel.barh(names, images, left=text, label="images", color=ORANGE)
    for name, share in totals.items():
        panel.annotate(
            f"{share.tokens / whole:.1%}", (share.tokens, name), (4, 0), textcoords="offset points", va="center"
        )
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.margins(x=0.12)
    panel.invert_yaxis()  # the first on top
    panel.spines[["top", "right"]].set_visible(False)
    panel.set(xlabel="tokens after cleaning")
    figure.legend(*panel.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return png(figure)
