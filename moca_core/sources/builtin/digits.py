"""scikit-learn's bundled handwritten digits (1797 real 8 x 8 scans), enlarged to grey-scale PNG of DIGIT_PX."""

import io
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from moca_core.sources.builtin.split import is_held_out, stable_hash

DIGIT_PX = (56, 56)  # 2 x 2 merged groups of patches at 28 px, 4 image tokens
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HELD_OUT_ONE_IN = 11  # about 160 of the 1797 digits

_BORDER_PX = 4
_PAPER = 245


@dataclass(frozen=True)
class Digit:
    """One scan: `pixels` is 8 x 8 bytes, 0 (paper) to 16 (ink)."""

    label: int
    pixels: bytes

    @property
    def name(self) -> str:
        return NAMES[self.label]

    @property
    def held_out(self) -> bool:
        return is_held_out(self.pixels.hex(), HELD_OUT_ONE_IN)


@lru_cache(maxsize=1)
def digits() -> tuple[Digit, ...]:
    """All scans, shuffled by content."""
    bundle = load_digits()
    scans = {
        Digit(int(label), image.astype(np.uint8).tobytes())
        for image, label in zip(bundle.images, bundle.target, strict=True)
    }
    return tuple(sorted(scans, key=lambda digit: (stable_hash("digit", digit.pixels.hex()), digit.label)))


@lru_cache(maxsize=1)
def training_digits() -> tuple[Digit, ...]:
    return tuple(digit for digit in digits() if not digit.held_out)


@lru_cache(maxsize=1)
def held_out_digits() -> tuple[Digit, ...]:
    return tuple(digit for digit in digits() if digit.held_out)


@lru_cache(maxsize=2048)
def digit_image(digit: Digit) -> bytes:
    """A scan as PNG, 56 x 56 px, mode L: dark strokes on light paper."""
    ink = np.frombuffer(digit.pixels, dtype=np.uint8).reshape(8, 8).astype(np.float32) / 16.0
    grey = Image.fromarray((_PAPER * (1.0 - ink)).astype(np.uint8))
    inner = (DIGIT_PX[0] - 2 * _BORDER_PX, DIGIT_PX[1] - 2 * _BORDER_PX)
    page = Image.new("L", DIGIT_PX, _PAPER)
    page.paste(grey.resize(inner, Image.Resampling.BICUBIC), (_BORDER_PX, _BORDER_PX))
    buffer = io.BytesIO()
    page.save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()
