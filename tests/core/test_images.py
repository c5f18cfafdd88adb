"""Pixels are those of transformers' own processor; untrusted files are refused by name, before they cost anything."""

import io
import pickle
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from samples import BOUNDS, picture, png
from transformers import Qwen2VLImageProcessorPil

from moca_core.data.images import REASONS, ImageBounds, ImageError, decode, grid_thw, header_size, patchify, target_size
from moca_core.model.inputs import add_noise, first_frame, normalise, repeat_in_time

SIDES = [(56, 56), (57, 83), (3, 5), (300, 200), (1, 150), (640, 480), (28, 28), (99, 1000), (141, 42)]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1"])
@pytest.mark.parametrize("size", [(57, 83), (300, 200), (640, 481)])
def test_pixels_are_those_of_the_processor(folder, spec, mode, size):
    data = png(*size, mode=mode)
    opened = Image.open(io.BytesIO(data))
    assert opened.mode == mode
    # transparency first: the processor drops it or lays it on white, depending on its version
    if "A" in mode:
        white = Image.new("RGBA", opened.size, "white")
        opened = Image.alpha_composite(white, opened.convert("RGBA")).convert("RGB")
    expected = Qwen2VLImageProcessorPil.from_pretrained(folder)(images=[opened], return_tensors="pt")
    patches = torch.from_numpy(patchify(decode(data), spec))
    values = repeat_in_time(normalise(patches, spec), spec)
    torch.testing.assert_close(values, expected["pixel_values"], atol=1e-5, rtol=1e-5)
    assert grid_thw(*header_size(data), spec) == tuple(expected["image_grid_thw"][0].tolist())
    torch.testing.assert_close(first_frame(values, spec), normalise(patches, spec))


def test_transparency_is_laid_on_white_as_the_processor_does(folder, spec):
    image = picture(84, 84, mode="RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    ours = normalise(torch.from_numpy(patchify(decode(buffer.getvalue()), spec)), spec)
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    theirs = processor(images=[image], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(repeat_in_time(ours, spec), theirs, atol=1e-5, rtol=1e-5)


def test_a_transparent_palette_colour_is_white():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 10, 10])
    image.putpixel((0, 0), 0)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=0)
    decoded = decode(buffer.getvalue())
    assert decoded.getpixel((0, 0)) == (255, 255, 255)
    assert decoded.getpixel((1, 1)) == (200, 10, 10)


@pytest.mark.parametrize("size", SIDES)
def test_size_is_that_of_the_processor(spec, size):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    height, width = smart_resize(size[1], size[0], spec.factor_px, *BOUNDS)
    assert target_size(*size, spec) == (width, height)
    assert len(patchify(Image.new("RGB", size), spec)) == width * height // spec.patch_size_px**2


def test_patches_lie_where_they_came_from(spec):
    """Every pixel holds its own address, so that the order of patches is read off the patches."""
    side = 2 * spec.factor_px
    rows, columns = np.indices((side, side))
    image = Image.fromarray(np.stack([rows, columns, rows * 0], axis=2).astype(np.uint8))
    patches = patchify(image, spec).reshape(-1, 3, spec.patch_size_px, spec.patch_size_px)
    corners = [(int(p[0, 0, 0]), int(p[1, 0, 0])) for p in patches]
    patch = spec.patch_size_px
    group = [(0, 0), (0, patch), (patch, 0), (patch, patch)]
    starts = [(0, 0), (0, 2 * patch), (2 * patch, 0), (2 * patch, 2 * patch)]
    assert corners == [(y + dy, x + dx) for y, x in starts for dy, dx in group]


def huge_png(width, height):
    """A valid header and the first lines of so many pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (png(80, 80)[:-400], "image_truncated"),
        (b"no image at all, only a text", "not_an_image"),
        (b"", "not_an_image"),
        (huge_png(20_000, 20_000), "image_too_many_pixels"),
        (huge_png(8_000, 7_000), "image_too_many_pixels"),
        (png(2, 500), "image_aspect_ratio"),
        (png(500, 2), "image_aspect_ratio"),
    ],
    ids=["cut", "text", "empty", "huge", "over the bound", "tall", "wide"],
)
def test_bad_files_are_refused_by_name(data, reason):
    with pytest.raises(ImageError) as caught:
        decode(data, ImageBounds())
    assert caught.value.reason == reason
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert (again.reason, again.detail) == (caught.value.reason, caught.value.detail)


def test_too_many_bytes():
    data = png(80, 80)
    assert decode(data, ImageBounds(max_bytes=len(data))).size == (80, 80)
    with pytest.raises(ImageError, match="image_too_many_bytes"):
        decode(data, ImageBounds(max_bytes=len(data) - 1))


def test_pixels_of_a_huge_image_are_never_decoded():
    tracemalloc.start()
    for size in ((20_000, 20_000), (8_000, 7_000)):
        with pytest.raises(ImageError):
            decode(huge_png(*size), ImageBounds())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4e6
    with pytest.raises(ImageError, match="too_many_pixels"):
        decode(png(80, 80)[:-400], ImageBounds(max_px=80 * 80 - 1))  # the header decides: truncation is never met


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "AVIF", "JPEG2000", "DDS"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_files_raise_nothing_but_image_error(kind):
    buffer = io.BytesIO()
    picture(40, 30).save(buffer, kind)
    data = buffer.getvalue()
    rng = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(data)
        for place in rng.integers(0, min(len(data), 200), rng.integers(1, 6)):
            damaged[place] = rng.integers(256)
        try:
            decode(bytes(damaged[: rng.integers(4, len(data) + 1)]), ImageBounds())
        except ImageError as error:
            assert error.reason in REASONS


def test_formats_that_need_programs_are_not_opened():
    buffer = io.BytesIO()
    picture(40, 30).save(buffer, "EPS")  # Pillow would run Ghostscript
    with pytest.raises(ImageError, match="not_an_image"):
        decode(buffer.getvalue())


@pytest.mark.parametrize("field", ["max_bytes", "max_px"])
def test_bounds_are_positive(field):
    with pytest.raises(ValueError, match="positive"):
        ImageBounds(**{field: 0})


def test_noise_replaces_masked_groups_alone_and_comes_back_from_its_seed(spec):
    values = torch.randn(24, spec.patch_values * spec.temporal_patch_size)
    masked = torch.tensor([True, False, True, False, False, True])
    noised = add_noise(values, masked, 7, spec)
    rows = masked.repeat_interleave(spec.group_size)
    assert torch.equal(noised[~rows], values[~rows])
    noise = noised[rows]
    assert not torch.isclose(noise, values[rows]).all(1).any()
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    correlation = torch.corrcoef(noise) - torch.eye(len(noise))
    assert correlation.abs().max() < 0.2  # no patch is a copy of another
    assert torch.equal(add_noise(values, masked, 7, spec), noised)
    assert not torch.equal(add_noise(values, masked, 8, spec)[rows], noise)
