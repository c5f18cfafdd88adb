"""Pixels are those of transformers' own processor and those that a person sees; bad files are refused by name, before they cost."""

import base64
import io
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from samples import BOUNDS, picture, png
from transformers import Qwen2VLImageProcessorPil
from transformers.image_utils import load_image

from moca_core.data.image_files import REASONS, ImageBounds, ImageError, decode, header_size
from moca_core.data.images import grid_thw, patchify, read_patches, target_size
from moca_core.model.inputs import first_frame, normalise, repeat_in_time

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


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def close(image, expected, tolerance):
    """Whether the mean difference is at most `tolerance` of 255, and not a turn or a swap of colours away."""
    got, expected = np.asarray(image, dtype=np.int16), np.asarray(expected, dtype=np.int16)
    return got.shape == expected.shape and np.abs(got - expected).mean() <= tolerance


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "MPO"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright(spec, kind, orientation):
    shown = np.asarray(picture(90, 60, 3))
    stored = {
        1: shown,
        2: shown[:, ::-1],
        3: shown[::-1, ::-1],
        4: shown[::-1],
        5: shown.swapaxes(0, 1),
        6: np.rot90(shown),  # the first row of the file is the right side of what is shown
        7: shown[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(shown, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif)
    assert header_size(data) == (90, 60)
    assert close(decode(data), shown, 12)  # subsampled colours; any other turn is 40 and more away
    assert close(decode(data), load_image(base64.b64encode(data).decode()), 0)
    patches = read_patches(data, spec)
    np.testing.assert_array_equal(patches, patchify(decode(data), spec))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_unreadable_exif_turns_nothing(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(picture(90, 60), kind, exif=exif)
    assert header_size(data) == (60, 90)
    broken = data.replace(b"MM\0*", b"XX\0*")
    assert broken != data and header_size(broken) == decode(broken).size == (90, 60)


def test_pixels_that_belie_the_header_are_refused():
    """Pillow turns a TIFF by its XMP too, but only as it decodes."""
    data = saved(picture(90, 60), "TIFF", tiffinfo={700: b'<rdf tiff:Orientation="6"/>'})
    assert header_size(data) == (90, 60)
    with pytest.raises(ImageError, match="image_truncated"):
        decode(data)


@pytest.mark.parametrize(
    "error", [KeyError, ZeroDivisionError, AssertionError, AttributeError, struct.error, zlib.error]
)
def test_whatever_a_decoder_raises_is_an_image_error(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error("in the depth of a decoder")

    data = png(80, 80)
    for owner, name in ((Image, "open"), (Image.core, "new")):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, fail)
            with pytest.raises(ImageError, match=f"image_truncated: {error.__name__}"):
                decode(data)


def cmyk():
    """(bands of ink, the colours that they print) of a smooth picture."""
    ink = np.stack([np.asarray(picture(64, 48, seed, "L")) for seed in range(4)], axis=2).astype(np.float32)
    return ink.astype(np.uint8), np.round((255 - ink[..., :3]) * (255 - ink[..., 3:]) / 255)


def test_cmyk_is_paper_minus_ink():
    ink, printed = cmyk()
    image = Image.fromarray(ink, "CMYK")
    assert close(decode(saved(image, "TIFF")), printed, 1)
    adobe = saved(image, "JPEG", quality=98, subsampling=0)
    assert b"Adobe" in adobe  # which means that ink is stored inverted
    assert close(decode(adobe), printed, 3)


def test_ycck_is_paper_minus_ink():
    ink, printed = cmyk()
    luma = np.asarray(Image.fromarray(ink[..., :3]).convert("YCbCr"))
    stored = np.dstack([255 - luma, ink[..., 3]])  # Pillow inverts as it writes
    data = bytearray(saved(Image.fromarray(stored, "CMYK"), "JPEG", quality=98, subsampling=0))
    transform = data.index(b"Adobe") + 11
    assert data[transform] == 0
    data[transform] = 2
    assert close(decode(bytes(data)), printed, 3)


RAMP = np.linspace(0, 65535, 64 * 40).reshape(40, 64)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (RAMP.astype(np.uint16), "PNG"),
        (RAMP.astype(np.uint16), "TIFF"),
        (RAMP.astype(">u2"), "TIFF"),
        (RAMP.astype(np.uint16), "PPM"),
        (RAMP.astype(np.int32), "TIFF"),
        (RAMP.astype(np.int32) * 30_000 - 10**9, "TIFF"),
        ((RAMP / 65535).astype(np.float32), "TIFF"),
        ((RAMP - 9000).astype(np.float32), "TIFF"),
    ],
    ids=["PNG 16", "TIFF 16", "TIFF 16 big-endian", "PGM 16", "TIFF 32", "TIFF 32 signed", "float 0 to 1", "float"],
)
def test_deep_grey_is_scaled_and_not_clipped(values, kind):
    data = saved(Image.fromarray(values), kind)
    expected = np.round(RAMP / 65535 * 255)[..., None].repeat(3, axis=2)
    difference = np.abs(np.asarray(decode(data), dtype=np.int16) - expected)
    assert difference.max() <= 1 and difference.mean() < 0.01
    assert header_size(data) == (64, 40)


def test_floats_that_are_no_numbers_are_black():
    values = np.full((8, 8), 0.5, np.float32)
    values[0] = np.nan, np.inf, -np.inf, 0, 1, 0.25, 0.75, 0.5
    assert np.asarray(decode(saved(Image.fromarray(values), "TIFF")))[0, :, 0].tolist() == [
        0,
        0,
        0,
        0,
        255,
        64,
        191,
        128,
    ]


@pytest.mark.parametrize("value", [np.float32(255), np.float32(-3), np.int32(70_000), np.int32(-1)])
def test_one_value_beyond_the_range_everywhere_is_black(value):
    assert decode(saved(Image.fromarray(np.full((8, 8), value)), "TIFF")).getextrema() == ((0, 0),) * 3


def test_dark_pictures_stay_dark():
    values = np.full((8, 8), 257 * 20, np.uint16)
    assert decode(saved(Image.fromarray(values), "PNG")).getpixel((0, 0)) == (20, 20, 20)


def test_one_bit_and_transparent_grey():
    bits = Image.fromarray(np.eye(16, dtype=bool))
    for kind in ("PNG", "TIFF", "BMP", "PPM"):
        assert close(decode(saved(bits, kind)), np.eye(16, dtype=np.uint8)[..., None].repeat(3, 2) * 255, 0)
    half = Image.merge(
        "LA", (Image.new("L", (4, 4), 100), Image.new("L", (4, 4), 51))
    )  # a fifth of grey, the rest paper
    for kind in ("PNG", "TIFF"):
        assert decode(saved(half, kind)).getpixel((0, 0)) == (224, 224, 224)
    deep = Image.fromarray(np.arange(16, dtype=np.uint16).reshape(4, 4) * 1000)
    see_through = np.asarray(decode(saved(deep, "PNG", transparency=3000)))
    assert see_through[0, 3].tolist() == [255] * 3 and see_through[0, 2].tolist() == [8] * 3


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF", "MPO"])
def test_of_several_frames_the_first_counts(kind):
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "lime", "blue")]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.n_frames == 3
    assert close(decode(data), frames[0], 2) and header_size(data) == (40, 30)


def test_colour_spaces_that_cannot_be_shown_are_refused_by_name():
    with pytest.raises(ImageError, match="image_unsupported"):
        decode(saved(Image.new("LAB", (8, 8)), "TIFF"))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("size", [(301, 399), (2003, 3001)])
def test_the_fast_path_sees_almost_the_same(spec, mode, orientation, size):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(picture(60, 50, 1).resize(size).convert(mode), "JPEG", exif=exif)
    exact, fast = (read_patches(data, spec, fast=fast).astype(np.int16) for fast in (False, True))
    np.testing.assert_array_equal(exact, patchify(decode(data), spec))
    assert exact.shape == fast.shape and (exact != fast).any()
    assert np.abs(exact - fast).mean() < 1.5


def test_large_jpegs_are_decoded_at_a_fraction_that_is_large_enough(spec, monkeypatch):
    """What is resized: all the pixels, or at least one and a half times the sides to come."""
    resized, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, *a, **k: resized.append(self.size) or resize(self, *a, **k))
    for side in (580, 590, 1170, 1180, 4000):  # the target is 196
        read_patches(saved(Image.new("RGB", (side, side)), "JPEG"), spec, fast=True)
    assert resized == [(580,) * 2, (295,) * 2, (585,) * 2, (295,) * 2, (500,) * 2]
    exif = Image.Exif()
    exif[0x0112] = 6
    resized.clear()
    read_patches(saved(Image.new("RGB", (1400, 700)), "JPEG", exif=exif), spec, fast=True)
    assert resized == [(700, 350)]


def test_a_fraction_is_not_shifted(spec):
    """An eighth of 4001 pixels is 501, of which the last holds one."""
    stripes = (np.arange(4001) // 60 % 2 * 255).astype(np.uint8)
    data = saved(Image.fromarray(np.broadcast_to(stripes, (4001, 4001))), "JPEG")
    exact, fast = (read_patches(data, spec, fast=fast).astype(np.int16) for fast in (False, True))
    assert np.abs(exact - fast).mean() < 3  # 15 without the box


def test_the_fast_path_enlarges_exactly(spec):
    for kind in ("JPEG", "PNG"):
        data = saved(picture(50, 40), kind)
        np.testing.assert_array_equal(read_patches(data, spec), read_patches(data, spec, fast=True))


def test_patches_are_written_where_they_belong(spec):
    data = png(150, 90)
    patches = read_patches(data, spec)
    room = np.zeros((len(patches) + 8, spec.patch_values), np.uint8)
    read_patches(data, spec, out=room[4:-4])
    np.testing.assert_array_equal(room[4:-4], patches)
    assert not room[:4].any() and not room[-4:].any()


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
    assert caught.value.reason == reason and reason in REASONS
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


OVERLAPPING = """
import sys, warnings
from moca_core.data.image_files import header_size, refusals
first, second = refusals(b""), refusals(b"")
first.__enter__(), second.__enter__()
first.__exit__(None, None, None), second.__exit__(None, None, None)
print(header_size(sys.stdin.buffer.read()))
warnings.warn("of somebody else's")
"""


def test_pillow_is_silent_and_others_are_heard_whatever_threads_read_at_once():
    """As two threads would enter and leave; in a process of its own, because pytest has filters of its own."""
    large = huge_png(10_000, 10_000)
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(io.BytesIO(large))
    done = subprocess.run([sys.executable, "-c", OVERLAPPING], input=large, capture_output=True, check=True)
    assert done.stdout.decode().strip() == "(10000, 10000)"
    assert b"of somebody else's" in done.stderr and b"DecompressionBomb" not in done.stderr


def test_formats_that_need_programs_are_not_opened():
    buffer = io.BytesIO()
    picture(40, 30).save(buffer, "EPS")  # Pillow would run Ghostscript
    with pytest.raises(ImageError, match="not_an_image"):
        decode(buffer.getvalue())


@pytest.mark.parametrize("field", ["max_bytes", "max_px"])
def test_bounds_are_positive(field):
    with pytest.raises(ValueError, match="positive"):
        ImageBounds(**{field: 0})
