"""WebDataset tars: captions, interleaved samples, frames of a TIFF, and archives that are broken or lead elsewhere."""

import io
import json
import tarfile

import pytest
from document_files import at, contents, mmc4_row, packed, put, read, reasons, tar
from PIL import Image
from samples import picture, png, text

from moca_core.data.image_files import decode
from moca_core.sources import webdataset
from moca_core.types import Document, Segment

A, B = png(60, 60, 1), png(80, 60, 2)
IMAGE_A, IMAGE_B = Segment(image=A), Segment(image=B)


def test_webdataset_captions(tmp_path):
    samples = [
        *[("00/1.jpg", A), ("00/1.txt", b"one"), ("00/1.json", b'{"caption": null, "key": "1"}')],
        *[("00/2.JPG", B), ("00/2.json", b'{"caption": "two"}')],
        *[("3.0.png", A), ("3.1.png", B), ("3.txt", "drei".encode("utf-8-sig"))],
        *[("4.txt", b"text alone")],
        *[("5.png", A)],
        *[("6.png", A), ("6.txt", b"\xff")],
        *[("7.png", A), ("7.json", b"[1]")],
        *[("8.png", A), ("8.json", b'{"caption": 3}')],
        *[("9.png", A), ("9.png", B)],
        *[("README", b"no sample"), ("._9.png", b"of a Mac")],
        *[("10.cls", b"7")],
    ]
    put(tmp_path / "set" / "00000.tar", tar(samples))
    items = read(webdataset, at(tmp_path))
    expected = [(IMAGE_A, text("one")), (IMAGE_B, text("two")), (IMAGE_A, IMAGE_B, text("drei")), (text("text alone"),)]
    assert [i.content for i in items[:5]] == [*expected, (IMAGE_A,)]
    assert reasons(items[5:9]) == ["malformed_text", "malformed_json", "malformed_row", "malformed_row"]
    assert items[9].content == () and len(items) == 10
    assert items[0].source == "set" and items[0].where.endswith("00000.tar member 00/1")
    (named,) = [
        i.content
        for i in read(
            webdataset,
            at(put(tmp_path / "x.tar", tar([("a.json", b'{"alt": "A", "text": "T"}')])), columns={"text": "alt"}),
        )
    ]
    assert named == (text("A"),)


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ("alt", [(IMAGE_A, text("A")), (IMAGE_B,), None]),
        ("txt", [None, None, (IMAGE_A, text("T"))]),
        ("atl", [None] * 3),
    ],
)
def test_a_caption_that_a_recipe_names_must_be_there(tmp_path, column, expected):
    samples = [("1.png", A), ("1.json", b'{"alt": "A", "caption": "C"}'), ("2.png", B), ("2.json", b'{"alt": null}')]
    put(tmp_path / "x.tar", tar([*samples, ("3.png", A), ("3.txt", b"T")]))
    items = read(webdataset, at(tmp_path, columns={"text": column}))
    assert reasons(items) == [None if content else "malformed_row" for content in expected]
    assert [item.content for item in items if isinstance(item, Document)] == [c for c in expected if c]
    said = [item.detail for item in items if not isinstance(item, Document)]
    assert all(f"no {column} for 'text'" in detail and "there are " in detail for detail in said)


@pytest.mark.parametrize("extension", ["tar.gz", "tgz", "tar.zst"])
def test_webdataset_compressed(tmp_path, extension):
    data = packed(tar([("1.png", A), ("1.txt", b"one")]), ".zst" if extension.endswith("zst") else ".gz", 3)
    put(tmp_path / f"0.{extension}", data)
    assert contents(read(webdataset, at(tmp_path))) == [(IMAGE_A, text("one"))]


def mint(images, texts, **members):
    row = json.dumps({"pdf_name": "x.pdf", "images": images, "texts": texts}).encode()
    return [("k.json", row), *((f"k.{name}", data) for name, data in members.items())]


def tiff(*images, **options):
    buffer = io.BytesIO()
    first, *others = images
    first.save(buffer, "TIFF", save_all=True, append_images=others, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("options", [{}, {"compression": "jpeg", "quality": 95}, {"compression": "tiff_lzw"}])
def test_webdataset_interleaved_with_a_tiff(tmp_path, options):
    frames = [picture(60, 60, 1), picture(80, 60, 2), picture(70, 60, 3)]
    names = ["page_0_image_85", None, "page_1_image_3", None]
    whole = tiff(*frames, **options)
    for number, sample in enumerate(
        [
            mint(names, [None, "between", None, "end"], tiff=whole),
            mint([names[0]], [None], tiff=tiff(frames[0])),
            mint([*names, "page_2_image_1", "p3"], [None, "a", None, "b", None, None], tiff=whole),
            mint([*names], [None], tiff=whole),
            mint([names[0], names[2]], [None, None], tiff=whole[:50]),
        ]
    ):
        put(tmp_path / f"{number}.tar", tar(sample))
    items = read(webdataset, at(tmp_path))
    broken = ["too_few_images", "texts_images_mismatch", "image_truncated"]
    assert reasons(items) == [None, None, *broken]
    (first, one, second, other), read_back = items[0].content, [Image.open(io.BytesIO(whole)) for _ in range(2)]
    assert (one, other) == (text("between"), text("end"))
    for number, (segment, image) in enumerate(zip((first, second), read_back, strict=True)):
        image.seek(number)
        assert decode(segment.image).tobytes() == image.convert("RGB").tobytes()
    assert items[1].content[0].image.startswith(b"II*")  # a single frame needs no other file


def test_webdataset_interleaved_with_named_files(tmp_path):
    rows_ = {"texts": ["one", None, None], "images": [None, "k.1.png", "0"]}
    put(tmp_path / "a.tar", tar([("k.json", json.dumps(rows_).encode()), ("k.0.png", A), ("k.1.png", B)]))
    mmc4_like = mmc4_row(["one"], ("b.png", 0))
    put(tmp_path / "b.tar", tar([("k.json", json.dumps(mmc4_like).encode()), ("k.b.png", B)]))
    assert contents(read(webdataset, at(tmp_path))) == [(text("one"), IMAGE_B, IMAGE_A), (IMAGE_B, text("one"))]


def other_kind(name, kind, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def test_webdataset_follows_no_links(tmp_path, monkeypatch):
    put(tmp_path / "secret.png", A)
    kinds = [
        (tarfile.SYMTYPE, "/etc/passwd"),
        (tarfile.LNKTYPE, "1.png"),
        (tarfile.CHRTYPE, ""),
        (tarfile.FIFOTYPE, ""),
    ]
    links = [other_kind(f"{i}.png", *kind) for i, kind in enumerate(kinds)]
    long = "d/" * 80 + "l.txt"
    good = [("ü.txt", b"good"), (long, b"long"), ("../up.txt", b"up"), ("big.png", bytes(3000))]
    for mode in ({"format": tarfile.GNU_FORMAT}, {"format": tarfile.PAX_FORMAT}):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", **mode) as archive:
            for info in [*links, other_kind("folder.png", tarfile.DIRTYPE)]:
                archive.addfile(info)
            for name, data in good:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        monkeypatch.setattr(webdataset, "MAX_SAMPLE_BYTES", 2000)
        items = read(webdataset, at(put(tmp_path / "s" / "x.tar", buffer.getvalue())))
        assert reasons(items) == [*["not_a_file"] * 4, None, None, None, "file_too_large"]
        assert [i.content for i in items[4:7]] == [(text("good"),), (text("long"),), (text("up"),)]
        assert items[5].where.endswith(long.removesuffix(".txt"))


def test_a_cut_tar_gives_the_good_part_and_one_rejection(tmp_path):
    whole = tar([(f"{i}.txt", b"x" * 700) for i in range(5)])
    assert len(read(webdataset, at(put(tmp_path / "a.tar", whole)))) == 5
    for cut in range(1, 5 * 1536 + 1, 311):
        items = read(webdataset, at(put(tmp_path / "a.tar", whole[:cut])))
        assert reasons(items)[-1] == "unreadable_file" and not any(reasons(items)[:-1])
        assert len(items) - 1 >= cut // 1536 - 1  # the last one before the cut may be part of a larger sample
    items = read(webdataset, at(put(tmp_path / "a.tar", whole[:1536] + b"\1" + whole[1537:])))
    assert reasons(items) == ["unreadable_file"]  # a broken header in the middle is not the end
    items = read(webdataset, at(put(tmp_path / "a.tar", whole[:1536] + bytes(1024) + whole[1536:])))
    assert reasons(items) == ["unreadable_file"]  # nor is an end mark with more behind it
