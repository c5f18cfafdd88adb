"""A documentation entry as the picture of a page: grey-scale PNG of PAGE_PX, dark ink on paper.

A title line, a rule, the summary, then the body wrapped to the page; what does not fit is left off. Rendering is a pure
function of the entry (and of the versions of Pillow and of the fonts, which `digest()` covers).
"""

import importlib.util
import io
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from moca_core.sources.builtin.docs import Entry

PAGE_PX = (224, 280)  # width, height: 8 x 10 merged groups of patches at 28 px, 80 image tokens
PAGE_TEXT_CHARS = 620  # about what a page shows; the text that goes with it in a document is cut here

_MARGIN_PX = 8
_TITLE_PX, _TEXT_PX = 13, 11  # font sizes; below 11 the letters lose their shape
_LINE_PX = 14
_PAPER, _INK, _RULE = 250, 20, 150


def page_image(entry: Entry) -> bytes:
    """The page of an entry as PNG, 224 x 280 px, mode L."""
    width, height = PAGE_PX
    image = Image.new("L", PAGE_PX, _PAPER)
    draw = ImageDraw.Draw(image)
    draw.fontmode = "L"
    title = _fitting_title(entry.name, width - 2 * _MARGIN_PX)
    draw.text((_MARGIN_PX, _MARGIN_PX - 3), title, fill=_INK, font=_font("DejaVuSans-Bold.ttf", _TITLE_PX))
    top = _MARGIN_PX + _TITLE_PX + 4
    draw.line((_MARGIN_PX, top, width - _MARGIN_PX, top), fill=_RULE)
    top += 4
    for text, gap in [(entry.summary, 5), *((line, 0) for line in entry.body.split("\n"))]:
        # A heading of the documentation ("Parameters:") stands out as it does on a printed page.
        name = "DejaVuSans-Bold.ttf" if text.endswith(":") and len(text) < 24 else "DejaVuSans.ttf"
        for line in _wrap(text, name, width - 2 * _MARGIN_PX):
            if top + _LINE_PX > height - _MARGIN_PX // 2:
                return _png(image)
            draw.text((_MARGIN_PX, top), line, fill=_INK, font=_font(name, _TEXT_PX))
            top += _LINE_PX
        top += gap
    return _png(image)


def _fitting_title(name: str, width_px: int) -> str:
    """As many of the last parts of a dotted name as fit on a line."""
    parts = name.split(".")
    font = _font("DejaVuSans-Bold.ttf", _TITLE_PX)
    for first in range(len(parts)):
        title = ".".join(parts[first:])
        if font.getlength(title) <= width_px:
            return title
    return parts[-1]


def _wrap(text: str, font_name: str, width_px: int) -> list[str]:
    """Lines of at most `width_px`; a single longer word (a dotted path) runs over the edge, as on many a real page."""
    space = _word_px(" ", font_name)
    lines: list[str] = []
    line: list[str] = []
    used = 0.0
    for word in text.split():
        needed = _word_px(word, font_name)
        if line and used + space + needed > width_px:
            lines.append(" ".join(line))
            line, used = [], 0.0
        used += needed + (space if line else 0.0)
        line.append(word)
    return [*lines, " ".join(line)] if line else lines


@lru_cache(maxsize=50_000)
def _word_px(word: str, font_name: str) -> float:
    return _font(font_name, _TEXT_PX).getlength(word)


@lru_cache(maxsize=8)
def _font(name: str, size_px: int) -> ImageFont.FreeTypeFont:
    """A font file that matplotlib brings with it, found without importing matplotlib."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("the pages of the built-in corpus are set in the fonts of matplotlib, which is not installed")
    path = Path(spec.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf" / name
    # The basic layout engine gives the same pixels whether or not libraqm is installed.
    return ImageFont.truetype(str(path), size_px, layout_engine=ImageFont.Layout.BASIC)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()
