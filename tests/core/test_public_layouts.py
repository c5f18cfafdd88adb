"""The public layouts: what is in them comes out once and in order; a broken row is named and cannot reach outside."""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from samples import png, text

from moca_core import sources
from moca_core.data.images import ImageBounds
from moca_core.data.validate import check_task, valid_documents, valid_pairs
from moca_core.sources import mmeb, mmeb_eval, moca, obelics
from moca_core.types import Document, Pair, Query, Rejected, Segment

FS = pafs.LocalFileSystem()
KICAD = Path(__file__).parents[3] / "shared" / "data" / "kicad"
needs_kicad = pytest.mark.skipif(not KICAD.exists(), reason="no KiCad corpus beside the repository")
A, B = png(60, 60, 1), png(80, 60, 2)
MARK = "<|image_1|>"


def write(path, rows, schema=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return {"path": str(path)}


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
    unit = write(tmp_path / "corpus" / "part-0.parquet", rows)
    items = list(obelics.read_unit(FS, unit))
    assert reasons(items) == [None, *["texts_images_mismatch"] * 3, None, None]
    assert items[0] == Document("corpus", (text("one"), Segment(image=A), text("two")))
    assert items[5].content == (Segment(image=A), Segment(image=B))
    assert items[1].where.endswith("part-0.parquet row 1") and "2 texts and 2 images" in items[1].detail
    assert reasons(valid_documents(items[4:5], ImageBounds())) == ["empty"]


def test_a_source_column_names_the_corpus(tmp_path):
    rows = [{"texts": ["a"], "images": [None], "source": s} for s in ("web", None)]
    schema = pa.schema([("texts", pa.list_(pa.string())), ("images", pa.list_(pa.binary())), ("source", pa.string())])
    unit = write(tmp_path / "corpus" / "a.parquet", rows, schema)
    assert [d.source for d in obelics.read_unit(FS, unit)] == ["web", "corpus"]


def test_moca(tmp_path):
    mark = moca.PLACEHOLDER
    rows = [
        {"text": f"one{mark}two{mark}", "images": [A, B]},
        {"text": f"{mark}", "images": []},
        {"text": "none", "images": [A]},
        {"text": "text alone", "images": None},
        {"text": f"{mark}", "images": [None]},
    ]
    items = list(moca.read_unit(FS, write(tmp_path / "set" / "x.parquet", rows)))
    assert reasons(items) == [None, "too_few_images", "too_many_images", None, None]
    assert items[0] == Document("set", (text("one"), Segment(image=A), text("two"), Segment(image=B)))
    assert items[3].content == (text("text alone"),)
    assert isinstance(next(valid_documents(items[4:], ImageBounds())), Rejected)


@pytest.fixture
def images(tmp_path):
    (tmp_path / "set" / "images").mkdir(parents=True)
    (tmp_path / "set" / "images" / "a.png").write_bytes(A)
    (tmp_path / "set" / "images" / "b.png").write_bytes(B)
    (tmp_path / "secret.png").write_bytes(png(30, 30))
    return tmp_path / "set"


def pair_row(**changes):
    row = {"qry": "q", "qry_image_path": "", "pos_text": "p", "pos_image_path": "", "neg_text": "[]"}
    return row | {"neg_image_path": "[]"} | changes


def test_mmeb_places_texts_and_images(images):
    rows = [
        pair_row(qry=f"{MARK}\nwhat is it?", qry_image_path="images/a.png"),
        pair_row(qry=f"look {MARK} here", qry_image_path="images/a.png", pos_text="", pos_image_path="images/b.png"),
        pair_row(qry="no mark", qry_image_path="./images/../images/b.png"),
        pair_row(neg_text="['it\\'s', '', None]", neg_image_path="[None, '', 'images/a.png']"),
        pair_row(neg_text="", neg_image_path=None, qry_image_path=None),
    ]
    items = list(mmeb.read_pairs(FS, write(images / "train.parquet", rows)))
    a, b = Segment(image=A), Segment(image=B)
    assert items == [
        Pair("set/train/image-to-text", (a, text("what is it?")), ((text("p"),),)),
        Pair("set/train/image-to-image", (text("look "), a, text(" here")), ((b,),)),
        Pair("set/train/image-to-text", (b, text("no mark")), ((text("p"),),)),
        Pair("set/train/text-to-text", (text("q"),), ((text("p"),),), ((text("it's"),), (a,))),
        Pair("set/train/text-to-text", (text("q"),), ((text("p"),),)),
    ]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"qry_image_path": "images/none.png"}, "image_missing"),
        ({"qry_image_path": "../secret.png"}, "image_missing"),
        ({"pos_image_path": "images/../../secret.png"}, "image_missing"),
        ({"qry_image_path": "ABSOLUTE"}, "image_missing"),
        ({"neg_text": "['']", "neg_image_path": "['../secret.png']"}, "image_missing"),
        ({"qry_image_path": "images"}, "image_missing"),
        ({"qry_image_path": "."}, "image_missing"),
        ({"qry_image_path": "images/a.png\0.txt"}, "malformed_row"),
        ({"qry": f"{MARK} without"}, "malformed_row"),
        ({"neg_text": "['one', 'two']", "neg_image_path": "['']"}, "malformed_row"),
        ({"neg_text": "['open"}, "malformed_row"),
        ({"neg_text": "('a',)", "neg_image_path": "('',)"}, "malformed_row"),
        ({"neg_text": "[1]", "neg_image_path": "['']"}, "malformed_row"),
        ({"neg_text": "[['a']]", "neg_image_path": "['']"}, "malformed_row"),
        ({"neg_text": "{[]: 1}"}, "malformed_row"),
        ({"neg_text": "[" * 5000 + "]" * 5000}, "malformed_row"),
        ({"neg_text": "-" * 50_000 + "1"}, "malformed_row"),
        ({"neg_text": "[open('RAN', 'w').close()]", "neg_image_path": "['']"}, "malformed_row"),
        ({"neg_text": "__import__('os').mkdir('RAN')"}, "malformed_row"),
    ],
)
def test_broken_mmeb_rows_are_named_and_run_nothing(images, changes, reason, monkeypatch):
    monkeypatch.chdir(images)
    changes = {k: str(images.parent / "secret.png") if v == "ABSOLUTE" else v for k, v in changes.items()}
    unit = write(images / "train.parquet", [pair_row(), pair_row(**changes), pair_row()])
    items = list(mmeb.read_pairs(FS, unit))
    assert reasons(items) == [None, reason, None]
    assert items[1].where.endswith("train.parquet row 1")
    assert not (images / "RAN").exists()


def eval_row(query, texts, paths, image=""):
    return {"qry_text": query, "qry_img_path": image, "tgt_text": texts, "tgt_img_path": paths}


def test_mmeb_eval(images):
    rows = [
        eval_row("first", ["yes", "no", "no", "yes"], ["", "", "", ""]),
        eval_row("second", ["no", "maybe"], ["", ""]),
        eval_row(f"{MARK}\nthird", ["", ""], ["images/b.png", "images/a.png"], "images/a.png"),
    ]
    tasks = list(mmeb_eval.read_tasks(FS, write(images / "test.parquet", rows)["path"]))
    first, second = tasks
    assert first.name == f"{images.name}/test/text-to-text"
    assert first.candidates == ((text("yes"),), (text("no"),), (text("maybe"),))
    # the right answer leads, whoever else asked for it first; a candidate given twice is one
    assert first.queries == (Query((text("first"),), (0,), (0, 1)), Query((text("second"),), (1,), (1, 2)))
    assert second.name == f"{images.name}/test/image-to-image"
    assert second.queries == (Query((Segment(image=A), text("third")), (0,), (0, 1)),)
    assert second.candidates == ((Segment(image=B),), (Segment(image=A),))
    for task in tasks:
        check_task(task, ImageBounds())


@pytest.mark.parametrize(
    ("row", "error"),
    [
        (eval_row("q", ["a", "b"], [""]), ValueError),
        (eval_row("q", [], []), ValueError),
        (eval_row("q", None, None), ValueError),
        (eval_row(f"{MARK}", ["a"], [""]), ValueError),
        (eval_row("q", [""], ["images/none.png"]), FileNotFoundError),
        (eval_row("q", [""], ["../secret.png"]), FileNotFoundError),
    ],
)
def test_a_broken_row_ends_an_evaluation(images, row, error):
    path = write(images / "test.parquet", [eval_row("good", ["yes", "no"], ["", ""]), row])["path"]
    with pytest.raises(error):
        list(mmeb_eval.read_tasks(FS, path))


def test_files_are_found_in_order_and_missing_columns_named(tmp_path):
    for name in ("b/2.parquet", "a.parquet", "b/1.parquet"):
        write(tmp_path / name, [{"texts": ["a"]}])
    (tmp_path / "notes.txt").write_text("x")
    units = obelics.list_units(FS, str(tmp_path))
    assert [u["path"].removeprefix(str(tmp_path)) for u in units] == ["/a.parquet", "/b/1.parquet", "/b/2.parquet"]
    assert obelics.list_units(FS, units[0]["path"]) == units[:1]
    with pytest.raises(ValueError, match=r"a\.parquet: no column images; it has texts"):
        list(obelics.read_unit(FS, units[0]))
    for nowhere in ("none", "notes"):
        (tmp_path / "notes").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=r"no \.parquet file there"):
            obelics.list_units(FS, str(tmp_path / nowhere))


def test_every_registered_layout_has_its_functions():
    wanted = {"DOCUMENTS": ["list_units", "read_unit"], "PAIRS": ["list_units", "read_pairs"], "TASKS": ["read_tasks"]}
    for registry, functions in wanted.items():
        for layout in getattr(sources, registry):
            module = sources.adapter(getattr(sources, registry), layout)
            assert all(callable(getattr(module, f)) for f in functions), layout
    with pytest.raises(ValueError, match="unknown layout 'csv'; use one of builtin, moca, obelics"):
        sources.adapter(sources.DOCUMENTS, "csv")


@needs_kicad
def test_kicad_documents():
    units = obelics.list_units(FS, str(KICAD / "interleaved"))
    items = [i for unit in units for i in obelics.read_unit(FS, unit)]
    raw = [r for unit in units for r in pq.read_table(unit["path"]).to_pylist()]
    assert len(items) == len(raw) == 599 and not any(isinstance(i, Rejected) for i in items)
    for document, row in zip(items, raw, strict=True):
        both = [t or i for t, i in zip(row["texts"], row["images"], strict=True) if t != ""]
        assert [s.text or s.image for s in document.content] == both
        assert document.source == row["source"]
    assert sum(s.image is not None for d in items for s in d.content) == 401
    assert Counter(reasons(valid_documents(items, ImageBounds())))[None] == 599


@needs_kicad
def test_kicad_pairs():
    (unit,) = mmeb.list_units(FS, str(KICAD / "mmeb_train.parquet"))
    items = list(valid_pairs(mmeb.read_pairs(FS, unit), ImageBounds()))
    assert len(items) == 494 and reasons(items) == [None] * 494
    assert {p.source for p in items} == {"kicad/mmeb_train/text-to-image", "kicad/mmeb_train/image-to-text"}
    assert all(len(p.positives) == 1 for p in items) and any(p.negatives for p in items)


@needs_kicad
def test_kicad_queries():
    tasks = list(mmeb_eval.read_tasks(FS, str(KICAD / "mmeb_eval.parquet")))
    assert sum(len(t.queries) for t in tasks) == 61
    raw = pq.read_table(KICAD / "mmeb_eval.parquet").to_pylist()
    asked = {}  # some questions are asked twice, with different answers
    for task in tasks:
        check_task(task, ImageBounds())
        for query in task.queries:
            asked.setdefault(query.content, []).append((query, task))
    for row in raw:
        query, task = asked[mmeb.content(FS, str(KICAD / "x"), row["qry_text"], row["qry_img_path"])].pop(0)
        right = mmeb.content(FS, str(KICAD / "x"), row["tgt_text"][0], row["tgt_img_path"][0])
        assert [task.candidates[i] for i in query.positives] == [right]
        assert len(query.candidates) == len(set(zip(row["tgt_text"], row["tgt_img_path"], strict=True)))


def test_shards_of_one_split_are_one_task_and_equal_files_of_two_folders_are_two():
    assert mmeb.task_name("/data/MSCOCO/train-00001-of-00004.parquet") == "MSCOCO/train"
    assert mmeb.task_name("bucket/VQA/train-00000-of-00001.parquet") == "VQA/train"
    assert mmeb.task_name("pairs.parquet") == "pairs"
