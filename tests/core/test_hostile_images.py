"""Thousands of broken files, and files built to cost: each is an image within its bounds or refused by name, in bounded time and memory.

The files are read in a child process, so that a decoder that crashes, hangs or eats the machine fails a test and not the tests.
"""

import io
import json
import resource
import struct
import subprocess
import sys
import zlib
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from samples import picture

from moca_core.data.image_files import BYTES_PER_BYTE, BYTES_PER_PX, REASONS, ImageBounds

KICAD = Path(__file__).resolve().parents[3] / "shared" / "data" / "kicad" / "images"
MUTANTS = 2000
BOUNDS = ImageBounds(max_bytes=2**20, max_px=1_000_000)
SECONDS_PER_IMAGE = 2.0
SLACK_BYTES = 2**23  # decoders that are loaded when they are first needed
HOSTILE_NUMBERS = (0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**24 - 1, 2**31 - 1, 2**31, 2**32 - 1)

# Reads files from a folder in order of their names. A line per file: its name before it is read, and what became of it.
READER = """
import json, sys, time
from pathlib import Path
import numpy as np
from PIL import ImageStat
from moca_core.data.image_files import ImageBounds, ImageError, decode, header_size
from moca_core.data.images import grid_thw, patchify, read_patches
from moca_core.spec import BackboneSpec

folder, settings = sys.argv[1], json.loads(sys.argv[2])
spec, bounds = BackboneSpec.from_dict(settings["spec"]), ImageBounds(*settings["bounds"])

def reason_of(read):
    try:
        return None, read()
    except ImageError as error:
        return error.reason, None

def fate(data):
    reason, image = reason_of(lambda: decode(data, bounds))
    announced_reason, announced = reason_of(lambda: header_size(data))
    if reason:
        return reason
    assert announced == image.size, (announced_reason, announced, image.size)
    assert image.mode == "RGB" and image.width * image.height <= bounds.max_px
    assert len(image.tobytes()) == 3 * image.width * image.height
    patches = read_patches(data, spec)
    assert len(patches) == np.prod(grid_thw(*announced, spec))
    np.testing.assert_array_equal(patches, patchify(image, spec))
    assert read_patches(data, spec, fast=True).shape == patches.shape
    return "decoded"

def peak_bytes():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

before = peak_bytes()
for path in sorted(Path(folder).iterdir()):
    print(json.dumps({"reading": path.name}), flush=True)
    data, started = path.read_bytes(), time.process_time()
    result = fate(data) if settings["patches"] else reason_of(lambda: decode(data, bounds))[0] or "decoded"
    print(json.dumps({"fate": result, "seconds": time.process_time() - started}), flush=True)
print(json.dumps({"peak": peak_bytes() - before}))
"""


def read_all(folder, spec, bounds, *, timeout_s, patches=True):
    """([(name, fate, seconds)], bytes that reading added to the peak of the process)."""
    settings = json.dumps({"spec": spec.to_dict(), "bounds": [bounds.max_bytes, bounds.max_px], "patches": patches})
    child = [sys.executable, "-c", READER, str(folder), settings]
    try:
        done = subprocess.run(
            child,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30)),
        )
    except subprocess.TimeoutExpired as expired:
        pytest.fail(f"hangs: {expired.stdout.splitlines()[-1:]}")
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, f"exit {done.returncode} after {lines[-1:]}\n{done.stderr[-2000:]}"
    *lines, last = lines
    names = [line["reading"] for line in lines[::2]]
    assert len(names) == len(list(Path(folder).iterdir()))
    return [(n, line["fate"], line["seconds"]) for n, line in zip(names, lines[1::2], strict=True)], last["peak"]


@lru_cache
def originals():
    """{kind: file} of real figures, and drawn ones where there are none, in every format that is read."""
    files = sorted(KICAD.glob("*.png"))[:40:8] if KICAD.is_dir() else []
    images = [Image.open(path).convert("RGBA") for path in files] or [picture(320, 200, 1, "RGBA")]
    for image in images:
        image.thumbnail((240, 240))
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = np.linspace(0, 65535, 160 * 100).reshape(100, 160).astype(np.uint16)
    found = {}

    def keep(name, image, kind, **options):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        found[name] = buffer.getvalue()

    for number, rgba in enumerate(images):
        rgb = rgba.convert("RGB")
        frames = {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)]}
        keep(f"png-rgba-{number}", rgba, "PNG")
        keep(f"png-palette-{number}", rgb.quantize(16), "PNG", transparency=0)
        keep(f"png-16-{number}", Image.fromarray(deep), "PNG")
        keep(f"apng-{number}", rgb, "PNG", **frames)
        keep(f"jpeg-{number}", rgb, "JPEG")
        keep(f"jpeg-progressive-{number}", rgb, "JPEG", progressive=True)
        keep(f"jpeg-cmyk-{number}", rgb.convert("CMYK"), "JPEG")
        keep(f"jpeg-exif-{number}", rgb, "JPEG", exif=exif)
        keep(f"mpo-{number}", rgb, "MPO", **frames)
        keep(f"webp-{number}", rgb, "WEBP", exif=exif)
        keep(f"webp-lossless-{number}", rgba, "WEBP", lossless=True)
        keep(f"webp-animated-{number}", rgb, "WEBP", **frames)
        keep(f"gif-animated-{number}", rgb, "GIF", **frames)
        keep(f"bmp-{number}", rgb, "BMP")
        keep(f"tiff-16-{number}", Image.fromarray(deep), "TIFF")
        keep(f"tiff-float-{number}", Image.fromarray(deep.astype(np.float32)), "TIFF")
        for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd"):
            keep(f"tiff-{compression}-{number}", rgb, "TIFF", compression=compression)
        keep(f"tiff-group4-{number}", rgb.convert("1"), "TIFF", compression="group4")
        keep(f"avif-{number}", rgb, "AVIF", speed=10, exif=exif)
        keep(f"jpeg2000-{number}", rgb, "JPEG2000")
        keep(f"ppm-{number}", rgb, "PPM")
    return found


def mutants():
    """[(name, bytes)], the same ones every time: each original in turn, damaged in one of the ways in turn."""
    rng = np.random.default_rng(20_000)
    files = sorted(originals().items())
    ways = (flipped, cut, overwritten, hostile_sizes, swapped, wrong_magic, unrelated)
    made = []
    for number in range(MUTANTS):
        name, data = files[rng.integers(len(files))]
        way = ways[number % len(ways)]
        made.append((f"{number:05d}-{way.__name__}-{name}", way(bytearray(data), rng)))
    return made


def flipped(data, rng):
    where = rng.integers(0, len(data) if rng.random() < 0.5 else min(len(data), 256), rng.integers(1, 12))
    for place in where:
        data[place] ^= 1 << rng.integers(8)
    return bytes(data)


def cut(data, rng):
    return bytes(data[: rng.integers(len(data))])


def overwritten(data, rng):
    place, length = rng.integers(len(data)), rng.integers(1, 64)
    data[place : place + length] = rng.bytes(length)
    return bytes(data)


def hostile_sizes(data, rng):
    """Numbers at the edges of their types, in either byte order, where headers and directories are."""
    ends = (0, max(0, len(data) - 400))  # a TIFF has its directory behind the pixels
    for _ in range(rng.integers(1, 4)):
        place = ends[rng.integers(2)] + rng.integers(min(len(data), 256))
        number = HOSTILE_NUMBERS[rng.integers(len(HOSTILE_NUMBERS))]
        layout = ("<I", ">I", "<H", ">H")[rng.integers(4)]
        packed = struct.pack(layout, number & (2**32 - 1 if layout[1] == "I" else 2**16 - 1))
        data[place : place + len(packed)] = packed
    return bytes(data)


def swapped(data, rng):
    """Two pieces of the file change places."""
    first, second, third = sorted(rng.integers(0, len(data), 3))
    return bytes(data[:first] + data[second:third] + data[first:second] + data[third:])


def wrong_magic(data, rng):
    magics = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"P6\n", b"RIFF")
    magic = magics[rng.integers(len(magics))]
    return magic + bytes(data[len(magic) :])


def unrelated(data, rng):
    return (b"", rng.bytes(500), b"no image at all", b"\0" * 999, b"{}", "größer".encode())[rng.integers(6)]


def write(files, folder):
    for name, data in files:
        (folder / name).write_bytes(data)
    return folder


def test_every_mutant_is_an_image_within_bounds_or_refused_by_name(spec, tmp_path):
    made = mutants()
    results, peak = read_all(write(made, tmp_path), spec, BOUNDS, timeout_s=120)
    counts = Counter(fate for _, fate, _ in results)
    print(dict(counts), f"peak {peak / 2**20:.0f} MiB, slowest {max(s for _, _, s in results):.2f} s")
    assert sum(counts.values()) == MUTANTS and set(counts) <= {*REASONS, "decoded"}
    assert counts["decoded"] > 200 and counts["not_an_image"] > 200 and counts["image_truncated"] > 200
    assert counts["image_too_many_pixels"] > 10
    assert max(results, key=lambda r: r[2])[2] < SECONDS_PER_IMAGE, max(results, key=lambda r: r[2])
    assert peak < BYTES_PER_PX * BOUNDS.max_px + BYTES_PER_BYTE * BOUNDS.max_bytes


def test_every_original_is_an_image(spec, tmp_path):
    results, _ = read_all(write(originals().items(), tmp_path), spec, BOUNDS, timeout_s=60)
    assert {fate for _, fate, _ in results} == {"decoded"}, [r for r in results if r[1] != "decoded"]


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(*tags, body=b""):
    """A grey TIFF of 10 x 10 pixels: `body`, then a directory of these (tag, type, count, value) besides the usual ones."""
    usual = [(256, 3, 1, 10), (257, 3, 1, 10), (258, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    entries = sorted({entry[0]: entry for entry in (*usual, *tags)}.values())
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *e) for e in entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + directory


def png_chunk(kind, body=b""):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def scan_bomb():
    """A progressive JPEG whose last scan comes thousands of times: each visits every pixel, and is a few bytes of the file."""
    data = saved(picture(1000, 1000), "JPEG", progressive=True)
    last = data[data.rfind(b"\xff\xda") : -2]
    return data[:-2] + last * 3000 + data[-2:]


def tile_bomb():
    """Ten by ten pixels out of a tile of 67 million."""
    body = zlib.compress(bytes(8192 * 8192), 9)
    return tiff((259, 3, 1, 8), (322, 4, 1, 8192), (323, 4, 1, 8192), (324, 4, 1, 8), (325, 4, 1, len(body)), body=body)


def strip_bomb():
    """Half a million strips, all at the same place."""
    body = struct.pack("<I", 8) * 500_000
    return tiff((259, 3, 1, 1), (273, 4, 500_000, 8), (278, 3, 1, 1), (279, 4, 1, 10), body=body)


def canvas_bomb():
    """An animated WebP of ten by ten pixels that claims a canvas of 169 million."""
    frame = picture(10, 10)
    data = bytearray(saved(frame, "WEBP", save_all=True, append_images=[picture(10, 10, 1)]))
    place = data.find(b"VP8X") + 12
    data[place : place + 6] = (12_999).to_bytes(3, "little") * 2
    return bytes(data)


def metadata():
    """{kind: file} of megabytes around a hundred pixels, in the smallest pieces that their formats know."""
    jpeg, png, gif = (saved(picture(10, 10), kind) for kind in ("JPEG", "PNG", "GIF"))
    exif = Image.Exif()
    exif[0x010E] = "x" * 60_000
    pixels = gif.index(b"\x2c\0\0\0\0")
    return {
        "jpeg-empty-segments": jpeg[:2] + b"\xff\xe5\0\2" * 500_000 + jpeg[2:],
        "jpeg-exif": saved(picture(10, 10), "JPEG", exif=exif),
        "png-texts": png[:33] + b"".join(png_chunk(b"tEXt", b"%d\0" % i) for i in range(100_000)) + png[33:],
        "png-text-bomb": png[:33] + png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**26), 9)) + png[33:],
        "png-profile-bomb": png[:33] + png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**26), 9)) + png[33:],
        "gif-comments": gif[:pixels] + b"\x21\xfe\1a\0" * 400_000 + gif[pixels:],
        "tiff-rationals": tiff(
            (259, 3, 1, 1), (273, 4, 1, 8), (279, 4, 1, 100), (282, 5, 250_000, 8), body=bytes(2_000_000)
        ),
    }


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (scan_bomb, "image_too_many_pixels"),
        (tile_bomb, "image_too_many_pixels"),
        (canvas_bomb, "image_too_many_pixels"),
        (strip_bomb, "image_unsupported"),
    ],
)
def test_bombs_are_refused_before_they_cost_anything(spec, tmp_path, make, reason):
    bounds = ImageBounds(max_px=10_000_000)
    (_, fate, seconds), peak = read_one(folder_of("bomb", make(), tmp_path), spec, bounds)
    assert fate == reason and seconds < 0.5
    assert peak < 2**25


def test_metadata_costs_memory_in_proportion_to_the_file(spec, tmp_path):
    for name, data in metadata().items():
        (_, fate, _), peak = read_one(folder_of(name, data, tmp_path), spec, ImageBounds())
        assert fate == ("image_truncated" if "bomb" in name else "decoded")
        assert peak < BYTES_PER_BYTE * len(data) + SLACK_BYTES, f"{name}: {peak / len(data)} bytes per byte"


def test_pixels_cost_memory_in_proportion_to_what_the_header_claims(spec, tmp_path):
    """The kinds of files that need most: a progressive JPEG holds its coefficients, an animation its canvases."""
    side = 1600
    image, exif = picture(side, side, mode="RGBA"), Image.Exif()
    rgb = image.convert("RGB")
    exif[0x0112] = 6
    files = {
        "png": saved(image, "PNG", compress_level=1),
        "jpeg": saved(rgb.convert("CMYK"), "JPEG", progressive=True, subsampling=0, exif=exif),
        "webp": saved(image, "WEBP", save_all=True, append_images=[picture(side, side, 1, "RGBA")], exif=exif),
        "avif": saved(image, "AVIF", speed=10, subsampling="4:4:4", exif=exif),
        "jpeg2000": saved(image, "JPEG2000", irreversible=True),
        "tiff": saved(Image.fromarray(np.random.default_rng(0).random((side, side), np.float32)), "TIFF"),
        "gif": saved(rgb.quantize(16), "GIF", transparency=0),
    }
    for name, data in files.items():
        (_, fate, _), peak = read_one(folder_of(name, data, tmp_path), spec, ImageBounds())
        assert fate == "decoded"
        assert peak < BYTES_PER_PX * side**2 + SLACK_BYTES, f"{name}: {peak / side**2} bytes per pixel"


def folder_of(name, data, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    return write([(name, data)], folder)


def read_one(folder, spec, bounds):
    (result,), peak = read_all(folder, spec, bounds, timeout_s=60, patches=False)
    return result, peak
