"""What does it find? Queries, their right answers and what the model puts first, side by side."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageOps

from pipelines.pictures.figure import GREEN
from pipelines.pictures.sheet import FAINT, beside, cell, font, line, png, stacked

CARD_PX, THUMB_PX, LINES, TEXT = 172, 120, 6, 11


def draw_gallery(title: str, tasks: Sequence[Mapping[str, Any]]) -> bytes:
    """PNG of what pipelines/reporting/gallery.py chose. Right answers have a frame and a ✓."""
    pieces = [line(title, 18, bold=True)]
    for task in tasks:
        pieces.append(
            line(f"{task['name']}: {task['precision']:.1%} of {task['queries']} queries right", 14, bold=True)
        )
        for entry in task["shown"]:
            rank = f"right: rank {entry['rank']}{' ✓' if entry['first'] else ''}, {entry['similarity']:.3f}"
            cards = [_card("query", entry["query"]), _card(rank, entry["answer"])]
            cards += [
                _card(f"{'✓ ' if found['right'] else ''}{found['similarity']:.3f}", found["content"], found["right"])
                for found in entry["found"]
            ]
            pieces.append(beside(cards))
    return png(stacked(pieces))


def _card(head: str, content: Mapping[str, Any], right: bool = False) -> Image.Image:
    inner_px = CARD_PX - 12
    parts = [line(head, TEXT, bold=True, ink=GREEN if right else FAINT)]
    for image in content["images"]:
        if image is None:
            parts.append(line("[cannot be read]", TEXT, ink=FAINT))
        else:
            parts.append(ImageOps.contain(image, (inner_px, THUMB_PX)))
    parts += [line(text, TEXT) for text in _wrapped(content["text"], inner_px)]
    card = cell(stacked(parts, gap_px=2), inner_px)
    framed = ImageOps.expand(card, border=4, fill="white")
    return ImageOps.expand(framed, border=2, fill=GREEN if right else "#e4e4e8")


def _wrapped(text: str, width_px: int) -> list[str]:
    """The first LINES lines of a text, broken between words where it can be."""
    letters, lines, rest = font(TEXT), [], text
    while rest and len(lines) < LINES:
        fits = max(1, bisect_right(range(len(rest) + 1), width_px, key=lambda n: letters.getlength(rest[:n])) - 1)
        cut = len(rest) if fits == len(rest) else rest.rfind(" ", 1, fits + 1)
        cut = cut if cut > 0 else fits
        lines.append(rest[:cut])
        rest = rest[cut:].lstrip()
    return lines
