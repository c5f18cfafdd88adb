"""Image files: from untrusted bytes to an upright image, or a reason why not.

What a file shows is decided from its bytes alone, the same wherever it is read: upright as its EXIF says, the first of several
frames, transparency on white, 16 bits scaled to 8. Reading one file takes at most BYTES_PER_PX for each pixel that its header
claims and BYTES_PER_BYTE for each of its bytes. AVIF alone can hide a larger frame than it claims; its own limit is 16384 x 16384.
"""

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from moca_core.spec import MAX_ASPECT_RATIO

# No others: Pillow also opens formats whose decoders run programs (EPS) or fail in ways of their own.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")

REASONS = (
    "not_an_image",
    "image_too_many_bytes",
    "image_too_many_pixels",
    "image_aspect_ratio",
    "image_truncated",  # or damaged in any other way
    "image_unsupported",
)

BYTES_PER_PX, BYTES_PER_BYTE = 28, 40  # measured by tests/core/test_hostile_images.py
PILLOW_MAX_PX = 2 * Image.MAX_IMAGE_PIXELS

_MAX_SCANS = 100  # of a JPEG at max_px; every scan visits all pixels again, and real files have about ten
_MAX_STRIPS = 100_000  # of a TIFF: Pillow makes an object of each, even of those that lie outside the image
_START_OF_SCAN = b"\xff\xda"
_STRIP_TAGS = (273, 279, 324, 325)  # offsets and sizes of strips and tiles
_TILE_WIDTH, _TILE_LENGTH = 322, 323

# What Pillow's decoders raise on damaged files, besides the errors that are named below.
_DAMAGED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)


@dataclass(frozen=True)
class ImageBounds:
    """Limits on an untrusted image file; the pixels are those its header claims."""

    max_bytes: int = 32 * 2**20
    max_px: int = 50_000_000

    def __post_init__(self) -> None:
        if self.max_bytes < 1 or self.max_px < 1:
            raise ValueError(f"image bounds must be positive, got max_bytes={self.max_bytes}, max_px={self.max_px}")
        if self.max_px > PILLOW_MAX_PX:
            raise ValueError(f"max_px={self.max_px} has no effect above {PILLOW_MAX_PX}, where Pillow itself refuses")


UNBOUNDED = ImageBounds(max_bytes=2**62, max_px=PILLOW_MAX_PX)


class ImageError(ValueError):
    """An image that cannot be used; `reason` is the word it is counted under, one of REASONS for an image file."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail

    def __reduce__(self):  # exceptions cross process borders
        return ImageError, (self.reason, self.detail)


def decode(data: bytes, bounds: ImageBounds | None = None) -> Image.Image:
    """RGB image of a file's bytes, every pixel of it decoded.

    The size in the header is checked against `bounds` before any pixel is decoded. Without bounds (images that were checked when
    they entered) only Pillow's own limit holds. Raises ImageError.
    """
    with refusals(data):
        image, size, orientation = open_image(data, bounds or UNBOUNDED)
        image = upright(image, orientation)
        if image.size != size:
            raise ImageError("image_truncated", f"the header says {size}, the pixels {image.size}")
        return image if image.mode == "RGB" else image.convert("RGB")


def header_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels of the upright image, from the header alone. Raises ImageError."""
    with refusals(data):
        return open_image(data, UNBOUNDED)[1]


@contextmanager
def refusals(data: bytes) -> Iterator[None]:
    """Whatever Pillow makes of a bad file, as ImageError."""
    _silence_pillow()
    try:
        yield
    except ImageError:
        raise
    except (Image.DecompressionBombError, MemoryError) as error:
        raise ImageError("image_too_many_pixels", str(error) or "no memory for them") from None
    except UnidentifiedImageError:
        raise ImageError("not_an_image", f"first bytes {data[:8]!r}") from None
    except _DAMAGED as error:
        raise ImageError("image_truncated", f"{type(error).__name__}: {error}") from None


@cache
def _silence_pillow() -> None:
    """No warnings of Pillow's from here on, of large images and damaged metadata: both are judged here. Once and for all, because what
    `warnings.catch_warnings` puts back is put back for all threads: those that leave it out of turn leave every warning off."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


def open_image(data: bytes, bounds: ImageBounds) -> tuple[Image.Image, tuple[int, int], int]:
    """(image whose pixels are still to be decoded, its size when upright, the orientation that EXIF gives it)."""
    if len(data) > bounds.max_bytes:
        raise ImageError("image_too_many_bytes", f"{len(data)} bytes, at most {bounds.max_bytes}")
    if data.startswith(tuple(TiffImagePlugin.PREFIXES)) and (strips := _strips(data)) > _MAX_STRIPS:
        raise ImageError("image_unsupported", f"TIFF of {strips} strips or tiles, at most {_MAX_STRIPS}")
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
    claimed_px = width * height
    if image.format == "TIFF":
        claimed_px = max(claimed_px, image.tag_v2.get(_TILE_WIDTH, 0) * image.tag_v2.get(_TILE_LENGTH, 0))
    if claimed_px > bounds.max_px:
        raise ImageError("image_too_many_pixels", f"{width} x {height}, at most {bounds.max_px} pixels")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageError("image_aspect_ratio", f"{width} x {height}, at most {MAX_ASPECT_RATIO} to 1")
    if bounds is not UNBOUNDED and image.format in ("JPEG", "MPO"):
        scans = data.count(_START_OF_SCAN)
        if scans * claimed_px > _MAX_SCANS * bounds.max_px:
            raise ImageError("image_too_many_pixels", f"{width} x {height} in {scans} scans")
    orientation = _orientation(image)
    return image, (height, width) if orientation in SIDEWAYS else (width, height), orientation


def _strips(data: bytes) -> int:
    """The most offsets or sizes of strips and tiles that the first directory of a TIFF lists."""
    order = "<" if data[:2] == b"II" else ">"
    big = data[2] == 43
    start, count, entry = ("8xQ", "Q", "HHQ8x") if big else ("4xI", "H", "HHI4x")
    (place,) = struct.unpack_from(order + start, data)
    (entries,) = struct.unpack_from(order + count, data, place)
    place += struct.calcsize(order + count)
    directory = data[place : place + entries * struct.calcsize(order + entry)]
    usable = len(directory) - len(directory) % struct.calcsize(order + entry)
    tags = struct.iter_unpack(order + entry, directory[:usable])
    return max((values for tag, _, values in tags if tag in _STRIP_TAGS), default=0)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1 (upright) where it cannot be read, as viewers do, and for TIFF, which Pillow turns as it decodes.

    What a PNG says after its pixels does not count: it would have to be decoded to know its size.
    """
    if image.format == "TIFF":
        return 1
    try:
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except _DAMAGED:
        return 1
    return orientation if orientation in _TURNS else 1


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """The decoded image in mode L or RGB, as a person sees it on white paper."""
    image.load()
    image = plain(image)
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def is_deep(image: Image.Image) -> bool:
    """Whether it is grey of 16 bits, 32 bits or floats: Pillow's own conversions make everything above 255 white."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def plain(image: Image.Image) -> Image.Image:
    if is_deep(image):
        return _eight_bits(image)
    if image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        if rgba.getchannel("A").getextrema()[0] == 255:
            return rgba.convert("RGB")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if image.mode in ("L", "RGB"):
        return image
    if image.mode == "LAB":
        raise ImageError("image_unsupported", "the colour space LAB")
    return image.convert("L" if image.mode == "1" else "RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, 32 bits or floats as L: 0 is black and 65535, or 1.0, is white. Where values lie beyond that, no convention
    says what is white: the least becomes black and the greatest white, as in viewers of such files; where all are the same, black."""
    values = np.asarray(image)
    transparent = values == image.info["transparency"] if "transparency" in image.info else None
    values = np.nan_to_num(values.astype(np.float32), copy=False, posinf=0, neginf=0)
    low, high = 0.0, 1.0 if image.mode == "F" else 65535.0
    if values.min() < low or values.max() > high:
        low, high = float(values.min()), float(values.max())
    values -= low
    values *= 255 / (high - low or 1)
    values += 0.5
    grey = values.astype(np.uint8)
    if transparent is not None:
        grey[transparent] = 255
    return Image.fromarray(grey)
