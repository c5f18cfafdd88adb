"""The layouts of documents that people have: what is in their files comes out once, in order, and as it was."""

import base64
import html
import io
import json
import re
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from document_files import at, lines, packed, pdf, put, read, reasons, table, tar
from PIL import Image
from samples import picture, png, text

from moca_core.data.images import ImageBounds, decode
from moca_core.data.validate import valid_documents, valid_pairs
from moca_core.sources import Location, captions, listing, markup, mmc4, obelics, pages, plain_text, rows, webdataset
from moca_core.sources import pdf as pdf_source
from moca_core.types import Document, Pair, Rejected, Segment

ROOT = Path(__file__).parents[2]
KICAD = ROOT.parent / "shared" / "data" / "kicad"
needs_kicad = pytest.mark.skipif(not KICAD.exists(), reason="no KiCad corpus beside the repository")
A, B = png(60, 60, 1), png(80, 60, 2)
IMAGE_A, IMAGE_B, NONE = Segment(image=A), Segment(image=B), Segment(image=b"")


def contents(items):
    assert not [i for i in items if isinstance(i, Rejected)], items
    return [item.content for item in items]


def mmc4_row(texts, *images, **changes):
    info = [{"image_name": n, "matched_text_index": i, "matched_sim": 0.3, "raw_url": "http://x/y"} for n, i in images]
    return {"text_list": texts, "image_info": info, "url": "http://x", "similarity_matrix": [[0.3]]} | changes


def test_mmc4(tmp_path):
    put(tmp_path / "set" / "a.png", A)
    inline = {"image_base64": base64.b64encode(B).decode(), "matched_text_index": 1}
    given = [
        mmc4_row(["one", "two", "three"], ("a.png", 2), ("lost.png", 0)),
        mmc4_row(["one", "two"], image_info=[inline, {"image_name": None, "matched_text_index": 1}]),
        mmc4_row(["alone"], image_info=None),
        mmc4_row(["one"], ("a.png", 1)),
        mmc4_row(["one"], ("../../etc/passwd", 0)),
        mmc4_row([3]),
        mmc4_row(["one"], image_info=["a.png"]),
        mmc4_row(["one"], image_info=[{"image_base64": "é", "matched_text_index": 0}]),
        {},
    ]
    put(tmp_path / "set" / "docs_shard_0.jsonl", lines(given))
    items = read(mmc4, at(tmp_path))
    assert items[0] == Document("set", (NONE, text("one two"), IMAGE_A, text("three")))
    assert items[1].content == (text("one"), IMAGE_B, NONE, text("two")) and items[2].content == (text("alone"),)
    assert reasons(items) == [None, None, None, "malformed_row", None, *["malformed_row"] * 3, None]
    assert items[4].content == (NONE, text("one")) and items[8].content == ()
    assert items[1].where.endswith(f"docs_shard_0.jsonl byte {len(lines(given[:1]))}")
    kept = [i for i in valid_documents(items, ImageBounds(), drop_images=True) if isinstance(i, Document)]
    assert [len(d.content) for d in kept] == [3, 3, 1, 1]


def test_images_lie_where_the_option_says(tmp_path):
    put(tmp_path / "pictures" / "x" / "a.png", A)
    put(tmp_path / "set" / "docs.jsonl", lines([mmc4_row(["one"], ("x/a.png", 0))]))
    (document,) = read(mmc4, at(tmp_path / "set", images=str(tmp_path / "pictures")))
    assert document.content == (IMAGE_A, text("one"))


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


def test_texts_of_all_kinds_in_one_folder(tmp_path):
    table(tmp_path / "fineweb" / "000.parquet", [{"text": "p1", "id": "x"}, {"text": None, "id": "y"}])
    put(tmp_path / "c4" / "c4-train.00000-of-01024.json.gz", packed(lines([{"text": "c1"}, {"text": "c2"}]), ".gz"))
    put(tmp_path / "dclm.jsonl.zst", packed(lines([{"text": f"d{i}"} for i in range(50)]), ".zst", 7))
    put(tmp_path / "m.jsonl", lines([{"content": "m1"}, {"other": 1}, {"text": 5}]) + b"\n{\n[1]\n")
    put(tmp_path / "dataset_infos.json", b"{}")
    put(tmp_path / "t" / "a.txt", "a\u00e9".encode("utf-8-sig"))
    put(tmp_path / "t" / "b.txt", b"\xff\xfe")
    items = read(plain_text, at(tmp_path))
    said = [i.content[0].text if isinstance(i, Document) else i.reason for i in items]
    broken = ["malformed_row", "malformed_row", "malformed_json", "malformed_json"]
    texts = [f"d{i}" for i in range(50)]
    assert said == ["p1", "", "c1", "c2", *texts, "m1", *broken, "a\u00e9", "malformed_text"]
    assert {i.source for i in items if isinstance(i, Document)} >= {"fineweb", "c4", "t"}
    assert reasons(valid_documents(items[1:2], ImageBounds())) == ["empty"]


def test_columns_are_named_by_role(tmp_path):
    location = at(table(tmp_path / "a.parquet", [{"body_text": "b", "text": "t"}]), columns={"text": "body_text"})
    assert contents(read(plain_text, location)) == [(text("b"),)]
    location = at(put(tmp_path / "a.jsonl", lines([{"body_text": "b", "text": "t"}])), columns={"text": "body_text"})
    assert contents(read(plain_text, location)) == [(text("b"),)]
    with pytest.raises(ValueError, match=r"no column nothing for 'text'; it has body_text, text"):
        read(plain_text, at(tmp_path / "a.parquet", columns={"text": "nothing"}))


@pytest.mark.parametrize(
    "cell",
    [A, {"bytes": A, "path": "x"}, {"bytes": None, "path": "i/a.png"}, "i/a.png"],
    ids=["bytes", "struct", "file", "path"],
)
def test_captions(tmp_path, cell):
    put(tmp_path / "set" / "i" / "a.png", A)
    given = [{"uid": "u", "url": "http://x", "vlm_caption": "a board", "image": c} for c in (cell, None)]
    items = read(captions, at(table(tmp_path / "set" / "x.parquet", given).parent))
    assert items[0] == Document("set", (IMAGE_A, text("a board"))) and items[1].content == (NONE, text("a board"))


def test_a_caption_table_without_images_says_what_it_lacks(tmp_path):
    table(tmp_path / "vlm_captions_cc12m_00.parquet", [{"uid": "u", "url": "http://x", "vlm_caption": "c"}])
    with pytest.raises(ValueError, match=r"no column image or jpg .* for 'image'; it has uid, url, vlm_caption"):
        read(captions, at(tmp_path))


def test_pages_of_colpali_vdr_and_docmatix(tmp_path):
    page, other = {"bytes": A, "path": "a.png"}, {"bytes": B, "path": None}
    colpali = {"image": page, "image_filename": "a", "query": "what?", "answer": "that", "source": "pdf", "page": "3"}
    vdr = [
        {"id": str(i), "query": q, "image": page, "negatives": ["7", "8"], "language": "en"}
        for i, q in enumerate(["q", None])
    ]
    turns = [{"user": f"q{i}", "assistant": f"a{i}", "source": "PDFA"} for i in range(2)]
    table(tmp_path / "colpali_train_set" / "train-00000-of-00082.parquet", [colpali])
    table(tmp_path / "en" / "train-00001-of-00002.parquet", vdr)
    table(tmp_path / "docmatix" / "train-00000-of-00002.parquet", [{"images": [page, other], "texts": turns}])
    table(tmp_path / "hard" / "train.parquet", [{"image": page, "query": "q", "negatives": [other, other]}])
    documents = {d.source: d.content for d in read(pages, at(tmp_path)) if d.content}
    assert documents["colpali_train_set"] == (IMAGE_A, text("what?\n\nthat"))
    assert documents["en"] == (IMAGE_A,)  # the second of two: it asks nothing
    assert documents["docmatix"] == (IMAGE_A, IMAGE_B, text("q0\n\na0\n\nq1\n\na1"))
    pairs = read(pages, at(tmp_path), "read_pairs")
    assert pairs == [
        Pair("colpali_train_set/train", (text("what?"),), ((IMAGE_A,),)),
        Pair("docmatix/train", (text("q0"),), ((IMAGE_A, IMAGE_B),)),
        Pair("docmatix/train", (text("q1"),), ((IMAGE_A, IMAGE_B),)),
        Pair("en/train", (text("q"),), ((IMAGE_A,),)),
        Pair("hard/train", (text("q"),), ((IMAGE_A,),), ((IMAGE_B,),)),
    ]
    assert pairs[2].where.endswith("row 0 question 1") and reasons(valid_pairs(pairs, ImageBounds())) == [None] * 5


MARKDOWN = f"""---
title: no part of it
---
# Board

Before ![the board](img/a%20b.png "A board") after, `![code](no.png)`.

```md
![fenced](no.png)
```
<img alt="B" src="b.png"/> ![web](https://example.org/x.png) ![lost](lost.png) ![in](data:image/png;base64,{base64.b64encode(A).decode()})
"""


def test_markdown(tmp_path):
    put(tmp_path / "docs" / "a.md", MARKDOWN)
    put(tmp_path / "docs" / "img" / "a b.png", A)
    put(tmp_path / "b.png", B)  # at the top of the source
    (document,) = read(markup, at(tmp_path))
    code = " after, `![code](no.png)`.\n\n```md\n![fenced](no.png)\n```\n"
    assert document.content == (text("# Board\n\nBefore "), IMAGE_A, text(code), IMAGE_B, text(" web "), NONE, IMAGE_A)
    assert document.source == "docs" and document.where.endswith("docs/a.md")


HTML = """<!DOCTYPE html><html><head><meta charset="windows-1252"><title>T</title><style>p{}</style></head><body>
<h1>Caf\u00e9 &amp; bar</h1><p>One <b>two</b>
three<br>four <!-- not this --></p><ul><li>a</li> <li>b</ul>
<table><tr><th>x</th><th>y</th></tr><tr><td>1</td><td>2</td></tr></table>
<pre>def f():
    pass</pre><script>if (a < b) document.write("<p>x")</script><img src='a.png' alt="A">
<p>1 < 2 <img src="//cdn/x.png" alt="web"></p></body></html>"""


def test_html(tmp_path):
    put(tmp_path / "docs" / "a.htm", HTML.encode("windows-1252"))
    put(tmp_path / "docs" / "a.png", A)
    (document,) = read(markup, at(tmp_path))
    said = ["Caf\u00e9 & bar", "One two three\nfour", "a\nb", "x | y\n1 | 2", "def f():\n    pass"]
    assert document.content == (text("\n\n".join(said)), IMAGE_A, text("1 < 2\n\nweb"))


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.md", b"\xef\xbb\xbfx", "x"),
        ("a.md", "x\u00e9".encode("utf-16"), "x\u00e9"),
        ("a.md", b"x\xe9", "malformed_text"),
        ("a.html", b"<meta http-equiv=x content='text/html; charset=Shift_JIS'>\x82\xa0", "\u3042"),
        ("a.html", b"<meta charset=zip>x", "x"),
        ("a.html", b"<meta charset=utf-16>x", "x"),
        ("a.html", b"&#" + b"9" * 5000 + b";&#xD800;", "&#" + "9" * 5000 + ";&#xD800;"),
        ("a.md", b"x" * (17 * 2**20), "file_too_large"),
        ("a.md", b"![x](data:image/png;base64,abc)", "malformed_row"),
    ],
)
def test_encodings_and_bounds_of_pages(tmp_path, name, data, expected):
    (item,) = read(markup, at(put(tmp_path / name, data)))
    assert (item.reason if isinstance(item, Rejected) else item.content[0].text) == expected


def test_pdf(tmp_path):
    put(tmp_path / "manuals" / "a.PDF", pdf([f"page {i} of eleven" for i in range(11)]))
    first, second = read(pdf_source, at(tmp_path))
    assert [len(d.content) for d in (first, second)] == [16, 6] and first.source == "manuals"
    assert [s.text for s in second.content[1::2]] == [f"page {i} of eleven" for i in (8, 9, 10)]
    assert decode(first.content[0].image).size == (1275, 1650) and first.content[0].image.startswith(b"\x89PNG")
    assert second.where.endswith("a.PDF pages 9 to 11")
    scan = io.BytesIO()
    picture(800, 800).save(scan, "PDF", resolution=72)
    (document,) = read(pdf_source, at(put(tmp_path / "scan.pdf", scan.getvalue())))
    assert len(document.content) == 1 and document.content[0].image.startswith(b"\xff\xd8")


ENCRYPTED = b"/Encrypt << /Filter /Standard /V 1 /R 2 /O (%s) /U (%s) /P -4 >>" % (b"o" * 32, b"u" * 32)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "pdf_unreadable"),
        (b"%PDF-1.4\nnothing", "pdf_unreadable"),
        (pdf([]), "pdf_unreadable"),
        (pdf(["a"]).replace(b"/Root 1", ENCRYPTED + b" /Root 1"), "pdf_encrypted"),
    ],
)
def test_pdfs_that_cannot_be_read(tmp_path, data, reason):
    items = read(pdf_source, at(put(tmp_path / "a.pdf", data)))
    assert {i.reason for i in items if isinstance(i, Rejected)} == {reason}


def test_pages_of_any_size_are_bounded(tmp_path, monkeypatch):
    for size in ((14400, 14400), (10**9, 1), (0.001, 0.001), (-612, 792), (0, 0), (10**38, 10**38)):
        for item in read(pdf_source, at(put(tmp_path / "a.pdf", pdf(["x"], size)))):
            if isinstance(item, Document):
                assert max(Image.open(io.BytesIO(item.content[0].image)).size) <= 2048
    monkeypatch.setattr(pdf_source, "MAX_FILE_BYTES", 100)
    assert reasons(read(pdf_source, at(tmp_path))) == ["file_too_large"]


def test_units_hold_every_row_once(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "UNIT_BYTES", 2000)
    monkeypatch.setattr(rows, "BATCH_ROWS", 3)
    given = [{"text": f"{i} " + "x" * (i * 37 % 300)} for i in range(500)]
    put(tmp_path / "l.jsonl", lines(given))
    table(tmp_path / "t.parquet", given, row_group_size=7)
    for path in ("l.jsonl", "t.parquet"):
        location = at(tmp_path / path)
        assert len(plain_text.list_units(location)) > 10
        items = read(plain_text, location)
        assert [c[0].text for c in contents(items)] == [row["text"] for row in given]
        assert len({item.where for item in items}) == 500
    units = plain_text.list_units(at(tmp_path / "t.parquet"))
    assert sum(unit["rows"] for unit in units) == 500
    for i in range(300):
        put(tmp_path / "many" / f"{i:03d}.md", f"page {i}")
    units = markup.list_units(at(tmp_path / "many"))
    assert len(units) == 2 and sum(unit["rows"] for unit in units) == 300
    assert [c[0].text for c in contents(read(markup, at(tmp_path / "many")))] == [f"page {i}" for i in range(300)]


def test_lines_are_read_once_whatever_the_cut(tmp_path):
    data = b"\n".join([b'{"text": "%d"}' % i for i in range(12)])  # no end of line at the end
    path = put(tmp_path / "a.jsonl", data.replace(b'"7"}', b'"7"}\r').replace(b'"9"}', b'"9"}\n'))
    size = path.stat().st_size
    location = at(path)
    for cut in range(size + 1):
        cuts = [{"path": str(path), "bytes": pair} for pair in ([0, cut], [cut, size])]
        said = [c[0].text for c in contents([i for unit in cuts for i in plain_text.read_unit(location, unit)])]
        assert said == [str(i) for i in range(12)], cut


def test_a_line_that_is_too_long_is_named_and_passed(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 100)
    given = [{"text": "a"}, {"text": "x" * 5000}, {"text": "b"}]
    for name, data in (("a.jsonl", lines(given)), ("a.jsonl.gz", packed(lines(given), ".gz"))):
        assert reasons(read(plain_text, at(put(tmp_path / name, data)))) == [None, "line_too_long", None]


def test_broken_compression_gives_the_good_part_and_one_rejection(tmp_path):
    data = lines([{"text": f"{i} {i * i}"} for i in range(20_000)])
    for extension in (".gz", ".zst"):
        whole = packed(data, extension, 5)
        items = read(plain_text, at(put(tmp_path / f"a.jsonl{extension}", whole[: len(whole) * 3 // 4])))
        assert reasons(items)[-1] == "unreadable_file" and not any(reasons(items)[:-1]) and len(items) > 11_500


def test_folders_globs_and_single_files(tmp_path):
    for name in ("a/1.jsonl", "a/2.jsonl", "b/1.jsonl", ".hidden/1.jsonl"):
        put(tmp_path / name, lines([{"text": name}]))
    for path, expected in (
        ("", 3),
        ("a", 2),
        ("*/1.jsonl", 2),
        ("a/[2-9].jsonl", 1),
        ("b/1.jsonl", 1),
        ("**/*.jsonl", 3),
    ):
        assert len(read(plain_text, at(tmp_path / path))) == expected, path
    with pytest.raises(ValueError, match=r"no \.md or"):
        read(markup, at(tmp_path))


def test_from_s3(tmp_path, s3, monkeypatch):
    import s3fs

    monkeypatch.setattr(listing, "UNIT_BYTES", 300)
    storage = s3fs.S3FileSystem(skip_instance_cache=True)
    given = [{"text": f"t{i}"} for i in range(60)]
    put(tmp_path / "w" / "0.tar.gz", packed(tar([("1.png", A), ("1.txt", b"one")]), ".gz"))
    put(tmp_path / "t" / "a.jsonl", lines(given))
    table(tmp_path / "t" / "b.parquet", given, row_group_size=20)
    put(tmp_path / "m" / "docs" / "a.md", "![x](i/a.png) ![y](lost.png)")
    put(tmp_path / "m" / "docs" / "i" / "a.png", A)
    put(tmp_path / "p" / "a.pdf", pdf(["x"], (100, 100)))
    storage.put(f"{tmp_path}/", "bucket/data/", recursive=True)
    fs = pafs.PyFileSystem(pafs.FSSpecHandler(storage))
    texts = [c[0].text for c in contents(read(plain_text, Location(fs, "bucket/data/t")))]
    assert texts == [row["text"] for row in given] * 2  # tables, then lines
    assert contents(read(webdataset, Location(fs, "bucket/data/w/*.gz"))) == [(IMAGE_A, text("one"))]
    assert contents(read(markup, Location(fs, "bucket/data/m"))) == [(IMAGE_A, NONE)]
    assert len(contents(read(pdf_source, Location(fs, "bucket/data/p/a.pdf")))) == 1


def joined(content):
    """Neighbouring texts as one, without the spaces around them."""
    out = []
    for segment in content:
        if segment.text is not None and out and out[-1].text is not None:
            out[-1] = text(f"{out[-1].text} {segment.text}")
        elif segment.text != "":
            out.append(segment)
    return [s if s.text is None else text(" ".join(s.text.split())) for s in out]


def as_mmc4(content):
    texts, info = [], []
    for segment in [*content, text("")]:
        if segment.text is None:
            inline = base64.b64encode(segment.image).decode()
            info.append({"image_base64": inline, "matched_text_index": len(texts)})
        else:
            texts.append(segment.text)
    return {"text_list": texts, "image_info": info}


def as_tar(documents):
    for number, document in enumerate(documents):
        names = [None if s.image is None else f"{i}.png" for i, s in enumerate(document.content)]
        row = {"texts": [s.text for s in document.content], "images": names}
        yield f"{number:04d}.json", json.dumps(row).encode()
        yield from ((f"{number:04d}.{n}", s.image) for n, s in zip(names, document.content, strict=True) if n)


def as_page(document, folder, number, extension):
    said = []
    for i, segment in enumerate(document.content):
        if segment.image is not None:
            put(folder / f"{number}_{i}.png", segment.image)
        shown = f"![]({number}_{i}.png)" if extension == "md" else f"<img src={number}_{i}.png>"
        written = segment.text if extension == "md" else f"<pre>{html.escape(segment.text or '')}</pre>"
        said.append(written if segment.image is None else shown)
    put(folder / f"{number:04d}.{extension}", "\n\n".join(said))


@needs_kicad
def test_kicad_in_every_layout(tmp_path):
    documents = read(obelics, at(KICAD / "interleaved"))[:300]
    expected = [joined(d.content) for d in documents]
    put(tmp_path / "m.jsonl.zst", packed(lines(as_mmc4(d.content) for d in documents), ".zst", 3))
    put(tmp_path / "w.tar.gz", packed(tar(as_tar(documents)), ".gz"))
    for extension in ("md", "html"):
        for number, document in enumerate(documents):
            as_page(document, tmp_path / extension, number, extension)
    for adapter, path in ((mmc4, "m.jsonl.zst"), (webdataset, "w.tar.gz"), (markup, "html"), (markup, "md")):
        read_back = contents(read(adapter, at(tmp_path / path)))
        different = [
            n
            for n, (c, e) in enumerate(zip(read_back, expected, strict=True))
            if joined(c) != e and not (path == "md" and re.search("[`~!]|---", "".join(s.text or "" for s in e)))
        ]
        assert not different, (path, different)
    assert Counter(s.image is None for d in documents for s in d.content)[False] > 100


@needs_kicad
def test_kicad_as_captions_and_pages(tmp_path):
    documents = read(obelics, at(KICAD / "interleaved"))
    both = [
        (s.image, t.text)
        for d in documents
        for s, t in zip(d.content, d.content[1:], strict=False)
        if s.image and t.text
    ]
    schema = pa.schema([("jpg", pa.large_binary()), ("caption", pa.large_string())])
    table(tmp_path / "c" / "0.parquet", [{"jpg": i, "caption": t} for i, t in both], schema, row_group_size=11)
    table(tmp_path / "p" / "0.parquet", [{"image": {"bytes": i, "path": "p"}, "query": t} for i, t in both])
    expected = [(Segment(image=i), text(t)) for i, t in both]
    assert len(both) > 100 and contents(read(captions, at(tmp_path / "c"))) == expected
    assert contents(read(pages, at(tmp_path / "p"))) == expected
    pairs = read(pages, at(tmp_path / "p"), "read_pairs")
    assert [(p.positives[0][0], p.query[0]) for p in pairs] == expected
    assert pq.read_metadata(tmp_path / "c" / "0.parquet").num_row_groups > 5


def guide_example():
    guide = (ROOT / "docs" / "add_a_source.md").read_text()
    return re.search(r"```python\n(\"\"\".*?)```", guide, re.DOTALL)[1]


def test_the_example_of_the_guide(tmp_path):
    code = guide_example()
    assert code.count("\n") <= 35
    module = tmp_path / "product_cards.py"
    module.write_text(code)
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("product_cards", module)
    adapter = module_from_spec(spec)
    spec.loader.exec_module(adapter)
    put(tmp_path / "shop" / "photos" / "a.png", A)
    cards = [{"title": "Desk", "photos": ["photos/a.png"], "description": "Oak."}, {"title": 3}, {"title": "Lamp"}]
    put(tmp_path / "shop" / "cards.jsonl.gz", packed(lines(cards), ".gz"))
    items = read(adapter, at(tmp_path))
    assert reasons(items) == [None, "malformed_row", None]
    assert items[0] == Document("shop", (text("Desk"), IMAGE_A, text("Oak."))) and items[2].content == (text("Lamp"),)
