"""Images as the vision tower wants them: resized within its bounds, as uint8 patches in its order."""

import math

import numpy as np
from PIL import Image

from moca_core.data.image_files import SIDEWAYS, UNBOUNDED, open_image, plain, refusals, upright
from moca_core.spec import BackboneSpec

_DRAFT_MARGIN = 1.5  # decoded sides over resized ones: at 1.1, pages of text differ by 31 dB, from 1.5 on by 36


def read_patches(data: bytes, spec: BackboneSpec, *, fast: bool = False, out: np.ndarray | None = None) -> np.ndarray:
    """uint8 patches [P, patch_values] of an image file that was checked when it entered; `out` as in `patchify`.

    The patches are to the bit those of the backbone's own processor. `fast`, for training, decodes JPEGs of three and more times
    the size to come at a half, a quarter or an eighth, and shrinks others with the Hamming filter: ms per image at 1024 tokens,
    mean difference of 255, PSNR: page of 150 dpi 32 to 24, 2.1, 36 dB; of 300 dpi 98 to 40, 1.3, 38 dB; photo of 2 megapixels
    32 to 26, 1.4, 43 dB; of 12 megapixels 161 to 75, 0.6, 49 dB. (Lanczos is 37 and 45 dB from the processor's bicubic.)
    Raises ImageError.
    """
    with refusals(data):
        image, upright_size, orientation = open_image(data, UNBOUNDED)
        size = target_size(*upright_size, spec)
        if fast:
            image = _reduced(image, size[::-1] if orientation in SIDEWAYS else size)
        return patchify(upright(image, orientation), spec, size=size, out=out)


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


def patchify(
    image: Image.Image,
    spec: BackboneSpec,
    *,
    size: tuple[int, int] | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """uint8 patches [P, patch_values] of an RGB or L image, the patches of one merged group next to each other.

    `size`: what to resize to, by default the target of the image's own size. `out`: contiguous room for the patches.
    """
    size = size or target_size(*image.size, spec)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    patch, merge = spec.patch_size_px, spec.merge_size
    rows, columns = size[1] // spec.factor_px, size[0] // spec.factor_px
    if out is None:
        out = np.empty((rows * columns * spec.group_size, spec.patch_values), np.uint8)
    line = np.dtype((np.void, patch))  # one line of a patch is copied as one item
    blocks = out.view(line).reshape(rows, columns, merge, merge, spec.channels, patch)
    planes = [np.asarray(band).view(line).reshape(rows, merge, patch, columns, merge) for band in image.split()]
    for channel in range(spec.channels):
        blocks[..., channel, :] = planes[channel % len(planes)].transpose(0, 3, 1, 4, 2)
    return out


def _reduced(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image as it was where `size` is larger, else resized: decoded at a fraction that is large enough, or by a short filter."""
    full = image.size
    if full == size or full[0] < size[0] or full[1] < size[1]:
        return image
    drafted = image.draft(None, tuple(math.ceil(side * _DRAFT_MARGIN) for side in size))
    resample = Image.Resampling.HAMMING if image.size == full else Image.Resampling.BICUBIC
    image.load()
    # The box, because the sides of a fraction are rounded up.
    return plain(image).resize(size, resample, box=drafted and drafted[1])
