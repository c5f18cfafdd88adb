"""The layouts of documents that people have: what is in their files comes out once, in order, and as it was."""

import base64
import html
import json
import re
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from document_files import at, contents, lines, mmc4_row, packed, pdf, put, read, reasons, table, tar
from samples import png, text

from moca_core.data.image_files import ImageBounds
from moca_core.data.validate import valid_documents, valid_pairs
from moca_core.sources import (
    Location,
    captions,
    listing,
    markup,
    mmc4,
    moca,
    obelics,
    pages,
    plain_text,
    rows,
    webdataset,
)
from moca_core.sources import contents as tables
from moca_core.sources import pdf as pdf_source
from moca_core.types import Document, Pair, Segment

ROOT = Path(__file__).parents[2]
KICAD = ROOT.parent / "shared" / "data" / "kicad"
needs_kicad = pytest.mark.skipif(not KICAD.exists(), reason="no KiCad corpus beside the repository")
A, B = png(60, 60, 1), png(80, 60, 2)
IMAGE_A, IMAGE_B, NONE = Segment(image=A), Segment(image=B), Segment(image=b"")
IN_LINES = base64.encodebytes(A).decode()


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
    [A, {"bytes": A, "path": "x"}, {"bytes": None, "path": "i/a.png"}, "i/a.png", f"data:;base64,{IN_LINES}"],
    ids=["bytes", "struct", "file", "path", "uri"],
)
def test_captions(tmp_path, cell):
    put(tmp_path / "set" / "i" / "a.png", A)
    given = [{"uid": "u", "url": "http://x", "vlm_caption": "a board", "image": c} for c in (cell, None)]
    items = read(captions, at(table(tmp_path / "set" / "x.parquet", given).parent))
    assert items[0] == Document("set", (IMAGE_A, text("a board"))) and items[1].content == (NONE, text("a board"))


def put_in(value, cell):
    """The value with this cell for every "LOST"."""
    if isinstance(value, list):
        return [put_in(item, cell) for item in value]
    return cell if value == "LOST" else value


LOST = ["gone.png", "https://example.org/a.png", "../a.png", {"bytes": None, "path": "gone.png"}]


@pytest.mark.parametrize("cell", LOST, ids=["file", "web", "outside", "struct"])
@pytest.mark.parametrize(
    ("adapter", "row"),
    [
        (obelics, {"texts": ["said", None], "images": [None, "LOST"]}),
        (moca, {"text": f"said{moca.PLACEHOLDER}", "images": ["LOST"]}),
        (captions, {"image": "LOST", "caption": "said"}),
        (pages, {"image": "LOST", "query": "said"}),
        (tables, {"image": "LOST", "text": "said"}),
        (tables, {"texts": ["said", None], "images": [None, "LOST"]}),
    ],
    ids=["obelics", "moca", "captions", "pages", "embed", "embed lists"],
)
def test_documents_may_lack_an_image_whatever_their_layout(tmp_path, adapter, row, cell):
    table(tmp_path / "set" / "x.parquet", [{name: put_in(value, cell) for name, value in row.items()}])
    items = read(adapter, at(tmp_path / "set"))
    assert len(items) == 1 and set(items[0].content) == {text("said"), NONE}
    assert reasons(valid_documents(items, ImageBounds())) == ["image_missing"]
    dropped, document = valid_documents(items, ImageBounds(), drop_images=True)
    assert dropped.reason == "dropped_image_missing" and document.content == (text("said"),)
    if adapter is pages:  # as a pair it is bad
        assert reasons(read(pages, at(tmp_path / "set"), "read_pairs")) == ["image_missing"]


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
