"""What does it learn from? The tokens of every source."""

from pipelines.mixture import Share
from pipelines.pictures.figure import BLUE, ORANGE, panels, png


def mixture_bars(mixture: dict[str, dict[str, Share]]) -> bytes:
    """PNG of the tokens by source, those of text and of images end to end."""
    totals = {source: sum(names.values(), Share()) for source, names in reversed(mixture.items())}  # the first on top
    figure, ((panel,),) = panels(1, 1, width=8, height=1.2 + 0.35 * len(totals))
    text = [share.tokens - share.image_tokens for share in totals.values()]
    panel.barh(list(totals), text, label="text", color=BLUE)
    images = [share.image_tokens for share in totals.values()]
    panel.barh(list(totals), images, left=text, label="images", color=ORANGE)
    panel.set(xlabel="tokens after cleaning")
    panel.legend()
    return png(figure)
