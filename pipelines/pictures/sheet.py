"""Pictures of pixels and words: pieces set side by side and below each other, on white, without a plotting library's guesses."""

import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

INK, FAINT = "#222222", "#777777"
GAP_PX = 12


@lru_cache
def font(size: int, *, bold: bool = False) -> "FreeTypeFont":
    """The font that matplotlib brings: Latin, Greek, Cyrillic and signs; what it lacks shows as a box."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)


def line(text: str, size: int = 13, *, bold: bool = False, ink: str = INK) -> Image.Image:
    """One line of text."""
    letters = font(size, bold=bold)
    picture = Image.new("RGB", (max(1, round(letters.getlength(text))), round(size * 1.5)), "white")
    ImageDraw.Draw(picture).text((0, 0), text, ink, letters)
    return picture


def boxed(pixels: np.ndarray, side_px: int) -> Image.Image:
    """An image [height, width, channels] as large as it gets in a square of `side_px`, in the middle of that width; with hard edges
    where it grows."""
    image = Image.fromarray(pixels)
    scale = side_px / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    image = image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    wide = Image.new("RGB", (side_px, size[1]), "white")
    wide.paste(image, ((side_px - size[0]) // 2, 0))
    return wide


def beside(pieces: Sequence[Image.Image], gap_px: int = GAP_PX) -> Image.Image:
    """From left to right, tops in line."""
    whole = Image.new(
        "RGB", (sum(p.width for p in pieces) + gap_px * (len(pieces) - 1), _most(pieces, "height")), "white"
    )
    x = 0
    for piece in pieces:
        whole.paste(piece, (x, 0))
        x += piece.width + gap_px
    return whole


def stacked(pieces: Sequence[Image.Image], gap_px: int = GAP_PX) -> Image.Image:
    """From top to bottom, left edges in line."""
    whole = Image.new(
        "RGB", (_most(pieces, "width"), sum(p.height for p in pieces) + gap_px * (len(pieces) - 1)), "white"
    )
    y = 0
    for piece in pieces:
        whole.paste(piece, (0, y))
        y += piece.height + gap_px
    return whole


def cell(picture: Image.Image, width_px: int) -> Image.Image:
    """The picture cut, or filled with white on its right, to a width."""
    filled = Image.new("RGB", (width_px, picture.height), "white")
    filled.paste(picture, (0, 0))
    return filled


def png(picture: Image.Image, margin_px: int = 16) -> bytes:
    framed = Image.new("RGB", (picture.width + 2 * margin_px, picture.height + 2 * margin_px), "white")
    framed.paste(picture, (margin_px, margin_px))
    buffer = io.BytesIO()
    framed.save(buffer, "PNG")
    return buffer.getvalue()


def _most(pieces: Sequence[Image.Image], side: str) -> int:
    return max(getattr(piece, side) for piece in pieces)
