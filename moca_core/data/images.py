"""Images: from the bytes of a file to uint8 patches in the order of the vision tower."""

import io
import math
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from moca_core.spec import MAX_ASPECT_RATIO, BackboneSpec

# No others: Pillow also opens formats whose decoders run programs (EPS) or fail in ways of their own.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")


PILLOW_MAX_PX = 2 * Image.MAX_IMAGE_PIXELS


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
    """An image that cannot be used; `reason` is the word it is counted under."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail

    def __reduce__(self):  # exceptions cross process borders
        return ImageError, (self.reason, self.detail)


def decode(data: bytes, bounds: ImageBounds | None = None) -> Image.Image:
    """RGB image of a file's bytes, transparency laid on white (as the exported processor does).

    The size in the header is checked against `bounds` before any pixel is decoded. Without bounds (images that were checked when
    they entered) only Pillow's own limit holds. Raises ImageError.
    """
    bounds = bounds or UNBOUNDED
    if len(data) > bounds.max_bytes:
        raise ImageError("image_too_many_bytes", f"{len(data)} bytes, at most {bounds.max_bytes}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound below is ours and stricter
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = image.size
            if width * height > bounds.max_px:
                raise ImageError("image_too_many_pixels", f"{width} x {height}, at most {bounds.max_px} pixels")
            if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
                raise ImageError("image_aspect_ratio", f"{width} x {height}, at most {MAX_ASPECT_RATIO} to 1")
            image.load()
    except Image.DecompressionBombError as error:
        raise ImageError("image_too_many_pixels", str(error)) from None
    except UnidentifiedImageError:
        raise ImageError("not_an_image", f"first bytes {data[:8]!r}") from None
    except (OSError, SyntaxError, ValueError, EOFError, RuntimeError) as error:  # AVIF raises RuntimeError
        if isinstance(error, ImageError):
            raise
        raise ImageError("image_truncated", str(error)) from None
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(canvas, rgba)
    return image.convert("RGB")


def header_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels from the header alone."""
    return Image.open(io.BytesIO(data), formats=FORMATS).size


def target_size(width: int, height: int, spec: BackboneSpec) -> tuple[int, int]:
    """(width, height) that the backbone sees: multiples of `factor_px`, area within the bounds, aspect ratio kept."""
    factor, low, high = spec.factor_px, spec.min_image_px, spec.max_image_px
    new_width, new_height = (round(side / factor) * factor for side in (width, height))
    if new_width * new_height > high:
        shrink = math.sqrt(width * height / high)
        new_width, new_height = (max(factor, math.floor(side / shrink / factor) * factor) for side in (width, height))
    elif new_width * new_height < low:
        grow = math.sqrt(low / (width * height))
        new_width, new_height = (math.ceil(side * grow / factor) * factor for side in (width, height))
    return new_width, new_height


def grid_thw(width: int, height: int, spec: BackboneSpec) -> tuple[int, int, int]:
    """Grid of patches (time, height, width) of an image of this size."""
    new_width, new_height = target_size(width, height, spec)
    return 1, new_height // spec.patch_size_px, new_width // spec.patch_size_px


def patchify(image: Image.Image, spec: BackboneSpec) -> np.ndarray:
    """uint8 patches [P, patch_values] of an RGB image, the patches of one merged group next to each other."""
    size = target_size(*image.size, spec)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(image, dtype=np.uint8)  # [H, W, C]
    patch, merge = spec.patch_size_px, spec.merge_size
    rows, columns = size[1] // spec.factor_px, size[0] // spec.factor_px
    blocks = pixels.reshape(rows, merge, patch, columns, merge, patch, spec.channels)
    blocks = blocks.transpose(0, 3, 1, 4, 6, 2, 5)  # [rows, columns, merge, merge, C, patch, patch]
    return np.ascontiguousarray(blocks).reshape(-1, spec.patch_values)
