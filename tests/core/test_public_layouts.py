"""The public layouts: what is in them comes out once and in order; a broken row is named and cannot reach outside."""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from samples import png, text

from moca_core import sources
from moca_core.data.image_files import ImageBounds
from moca_core.data.validate import valid_documents
from moca_core.sources import Location, moca, obelics
from moca_core.types import Document, Rejected, Segment

FS = pafs.LocalFileSystem()
KICAD = Path(__file__).parents[3] / "shared" / "data" / "kicad"
needs_kicad = pytest.mark.skipif(not KICAD.exists(), reason="no KiCad corpus beside the repository")
A, B = png(60, 60, 1), png(80, 60, 2)


def write(path, rows, schema=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return Location(FS, str(path))


def read(adapter, location):
    return [item for unit in adapter.list_units(location) for item in adapter.read_unit(location, unit)]


def reasons(items):
    return [i.reason if isinstance(i, Rejected) else None for i in items]


def test_obelics(tmp_path):
    rows = [
        {"texts": ["one", None, "two", ""], "images": [None, A, None, None]},
        {"texts": ["one", None], "images": [None, None]},
        {"texts": ["one"], "images": [A]},
        {"texts": ["one", "two"], "images": [None]},
        {"texts": None, "images": None},
        {"texts": [None, None], "images": [A, B]},
    ]
    items = read(obelics, write(tmp_path / "corpus" / "part-0.parquet", rows))
    assert reasons(items) == [None, *["texts_images_mismatch"] * 3, None, None]
    assert items[0] == Document("corpus", (text("one"), Segment(image=A), text("two")))
    assert items[5].content == (Segment(image=A), Segment(image=B))
    assert items[1].where.endswith("part-0.parquet row 1") and "2 texts and 2 images" in items[1].detail
    assert reasons(valid_documents(items[4:5], ImageBounds())) == ["empty"]


def test_a_source_column_names_the_corpus(tmp_path):
    rows = [{"texts": ["a"], "images": [None], "source": s} for s in ("web", None)]
    schema = pa.schema([("texts", pa.list_(pa.string())), ("images", pa.list_(pa.binary())), ("source", pa.string())])
    location = write(tmp_path / "corpus" / "a.parquet", rows, schema)
    assert [d.source for d in read(obelics, location)] == ["web", "corpus"]


def test_moca(tmp_path):
    mark = moca.PLACEHOLDER
    rows = [
        {"text": f"one{mark}two{mark}", "images": [A, B]},
        {"text": f"{mark}", "images": []},
        {"text": "none", "images": [A]},
        {"text": "text alone", "images": None},
        {"text": f"{mark}", "images": [None]},
    ]
    items = read(moca, write(tmp_path / "set" / "x.parquet", rows))
    assert reasons(items) == [None, "too_few_images", "too_many_images", None, None]
    assert items[0] == Document("set", (text("one"), Segment(image=A), text("two"), Segment(image=B)))
    assert items[3].content == (text("text alone"),)
    assert isinstance(next(valid_documents(items[4:], ImageBounds())), Rejected)


def test_files_are_found_in_order_and_missing_columns_named(tmp_path):
    for name in ("b/2.parquet", "a.parquet", "b/1.parquet"):
        write(tmp_path / name, [{"texts": ["a"]}])
    (tmp_path / "notes.txt").write_text("x")
    units = obelics.list_units(Location(FS, str(tmp_path)))
    assert [u["path"].removeprefix(str(tmp_path)) for u in units] == ["/a.parquet", "/b/1.parquet", "/b/2.parquet"]
    assert obelics.list_units(Location(FS, units[0]["path"])) == units[:1]
    with pytest.raises(ValueError, match=r"a\.parquet: no column images for 'images'; it has texts"):
        read(obelics, Location(FS, units[0]["path"]))
    for nowhere in ("none", "notes"):
        (tmp_path / "notes").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=r"no \.parquet file there"):
            obelics.list_units(Location(FS, str(tmp_path / nowhere)))


def test_every_registered_layout_has_its_functions():
    wanted = {"DOCUMENTS": ["list_units", "read_unit"], "PAIRS": ["list_units", "read_pairs"], "TASKS": ["read_tasks"]}
    for registry, functions in wanted.items():
        for layout in getattr(sources, registry):
            module = sources.adapter(getattr(sources, registry), layout)
            assert all(callable(getattr(module, f)) for f in functions), layout
    with pytest.raises(ValueError, match="unknown layout 'csv'; use one of builtin, captions, markup"):
        sources.adapter(sources.DOCUMENTS, "csv")


@needs_kicad
def test_kicad_documents():
    items = read(obelics, Location(FS, str(KICAD / "interleaved")))
    raw = [r for path in sorted((KICAD / "interleaved").iterdir()) for r in pq.read_table(path).to_pylist()]
    assert len(items) == len(raw) == 599 and not any(isinstance(i, Rejected) for i in items)
    for document, row in zip(items, raw, strict=True):
        both = [t or i for t, i in zip(row["texts"], row["images"], strict=True) if t != ""]
        assert [s.text or s.image for s in document.content] == both
        assert document.source == row["source"]
    assert sum(s.image is not None for d in items for s in d.content) == 401
    assert Counter(reasons(valid_documents(items, ImageBounds())))[None] == 599
