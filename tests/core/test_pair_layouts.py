"""The layouts of pairs and tasks, from files as the public sets have them: what is in them comes out, once; what is broken is named."""

import base64
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from layout_files import at, lines, parquet, read, reasons, said
from samples import png, text

from moca_core import sources
from moca_core.data.image_files import ImageBounds
from moca_core.data.validate import check_task, valid_pairs
from moca_core.sources import listing, mmeb, mmeb_eval, pairs_jsonl, triplets
from moca_core.sources.pairing import task_name
from moca_core.types import Pair, Query, Segment

ROOT = Path(__file__).parents[2]
KICAD = ROOT.parent / "shared" / "data" / "kicad"
needs_kicad = pytest.mark.skipif(not KICAD.exists(), reason="no KiCad corpus beside the repository")
A, B = png(60, 60, 1), png(80, 60, 2)
IMAGE_A, IMAGE_B = Segment(image=A), Segment(image=B)
MARK = "<|image_1|>"


@pytest.fixture
def images(tmp_path):
    (tmp_path / "set" / "images").mkdir(parents=True)
    (tmp_path / "set" / "images" / "a.png").write_bytes(A)
    (tmp_path / "set" / "images" / "b.png").write_bytes(B)
    (tmp_path / "secret.png").write_bytes(png(30, 30))
    return tmp_path / "set"


# MMEB


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
        pair_row(neg_text="a plain text"),
        pair_row(neg_text="['', '']", neg_image_path="['', '']"),
        pair_row(neg_text="['p', 'other', 'other', 'p']", neg_image_path=""),
    ]
    items = read(mmeb, parquet(images / "train.parquet", rows))
    asked, answer = (text("q"),), ((text("p"),),)
    assert items == [
        Pair("set/train/image-to-text", (IMAGE_A, text("what is it?")), answer),
        Pair("set/train/image-to-image", (text("look "), IMAGE_A, text(" here")), ((IMAGE_B,),)),
        Pair("set/train/image-to-text", (IMAGE_B, text("no mark")), answer),
        Pair("set/train/text-to-text", asked, answer, ((text("it's"),), (IMAGE_A,))),
        Pair("set/train/text-to-text", asked, answer),
        Pair("set/train/text-to-text", asked, answer, ((text("a plain text"),),)),
        Pair("set/train/text-to-text", asked, answer),
        Pair("set/train/text-to-text", asked, answer, ((text("other"),),)),
    ]


def test_the_folders_of_mmeb_train(images, tmp_path):
    """Subsets in folders, image paths from the top; a glob picks one of the versions of each subset, and needs `images`."""
    top = tmp_path / "MMEB-train"
    top.mkdir()
    images.joinpath("images").rename(top / "images")
    row = pair_row(qry=MARK, qry_image_path="images/a.png")
    for subset in ("ImageNet_1K", "CIRR"):
        for version in ("original", "diverse_instruction"):
            parquet(top / subset / f"{version}-00000-of-00001.parquet", [row, row])
    del row["neg_text"], row["neg_image_path"]
    parquet(top / "VOC2007" / "train" / "0000.parquet", [row])
    items = read(mmeb, top)
    assert sorted({pair.source for pair in items}) == [
        "CIRR/diverse_instruction/image-to-text",
        "CIRR/original/image-to-text",
        "ImageNet_1K/diverse_instruction/image-to-text",
        "ImageNet_1K/original/image-to-text",
        "VOC2007/train/image-to-text",
    ]
    assert len(items) == 9 and all(pair.query == (IMAGE_A,) for pair in items)
    items = read(mmeb, top / "*" / "original-*.parquet", images=str(top))
    assert len(items) == 4 and {pair.query for pair in items} == {(IMAGE_A,)}
    assert reasons(read(mmeb, top / "*" / "original-*.parquet", images=str(tmp_path))) == ["image_missing"] * 4


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
        ({"qry_image_path": "images/a.png\0.txt"}, "image_missing"),
        ({"qry": f"{MARK} without"}, "malformed_row"),
        ({"qry": f"{MARK} twice {MARK}", "qry_image_path": "images/a.png"}, "malformed_row"),
        ({"neg_text": "['one', 'two']", "neg_image_path": "['']"}, "malformed_row"),
        ({"neg_text": "['open"}, "malformed_row"),
        ({"neg_text": "['a cat' 'a sofa']"}, "malformed_row"),  # str() of a NumPy array
        ({"neg_text": "['a cat'\n 'a sofa', 'x']"}, "malformed_row"),
        ({"neg_text": "[1]", "neg_image_path": "['']"}, "malformed_row"),
        ({"neg_text": "[['a']]", "neg_image_path": "['']"}, "malformed_row"),
        ({"neg_text": "[{[]: 1}]"}, "malformed_row"),
        ({"neg_text": "['\\ud800']"}, "malformed_text"),
        ({"neg_text": "[" * 5000 + "]" * 5000}, "malformed_row"),
        ({"neg_text": "[" + "'a'," * 2**19 + "]"}, "malformed_row"),
        ({"neg_text": "[" + "-" * 50_000 + "1]"}, "malformed_row"),
        ({"neg_text": "[open('RAN', 'w').close()]", "neg_image_path": "['']"}, "malformed_row"),
        ({"neg_text": "[__import__('os').mkdir('RAN')]"}, "malformed_row"),
    ],
)
def test_broken_mmeb_rows_are_named_and_run_nothing(images, changes, reason, monkeypatch):
    monkeypatch.chdir(images)
    changes = {k: str(images.parent / "secret.png") if v == "ABSOLUTE" else v for k, v in changes.items()}
    items = read(mmeb, parquet(images / "train.parquet", [pair_row(), pair_row(**changes), pair_row()]))
    assert reasons(items) == [None, reason, None]
    assert items[1].where.endswith("train.parquet row 1")
    assert not (images / "RAN").exists()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/data/MMEB-train/ImageNet_1K/original-00000-of-00001.parquet", "ImageNet_1K/original"),
        ("/data/MSCOCO/train-00001-of-00004.parquet", "MSCOCO/train"),
        ("bucket/VQA/train-00000-of-00001.parquet", "VQA/train"),
        ("mmE5-synthetic/Retrieval/Retrieval.parquet", "Retrieval"),
        ("MMEB-eval/VOC2007/test/0000.parquet", "VOC2007/test"),
        ("moca-embed/visrag_ind/data/train-00000-of-00013.parquet", "visrag_ind/train"),
        ("mine/pairs.jsonl.gz", "mine/pairs"),
        ("pairs.parquet", "pairs"),
    ],
)
def test_shards_of_one_split_are_one_task_and_equal_files_of_two_folders_are_two(path, name):
    assert task_name(path) == name


def eval_row(query, texts, paths, image=""):
    return {"qry_text": query, "qry_img_path": image, "tgt_text": texts, "tgt_img_path": paths}


def test_mmeb_eval(images):
    rows = [
        eval_row("first", ["yes", "no", "no", "yes"], ["", "", "", ""]),
        eval_row("second", ["no", "maybe"], ["", ""]),
        eval_row(f"{MARK}\nthird", ["", ""], ["images/b.png", "images/a.png"], "images/a.png"),
        eval_row(f"{MARK}\nfourth", None, ["images/a.png", "images/b.png"], "images/a.png"),
    ]
    first, second = tasks = list(mmeb_eval.read_tasks(at(parquet(images / "test.parquet", rows))))
    assert first.name == "set/test/text-to-text"
    assert first.candidates == ((text("yes"),), (text("no"),), (text("maybe"),))
    # the right answer leads, whoever else asked for it first; a candidate given twice is one
    assert first.queries == (Query((text("first"),), (0,), (0, 1)), Query((text("second"),), (1,), (1, 2)))
    assert second.name == "set/test/image-to-image"
    assert second.queries[0] == Query((IMAGE_A, text("third")), (0,), (0, 1))
    assert second.queries[1] == Query((IMAGE_A, text("fourth")), (1,), (1, 0))
    assert second.candidates == ((IMAGE_B,), (IMAGE_A,))
    for task in tasks:
        check_task(task, ImageBounds())


def test_shards_of_an_evaluation_are_one_task(tmp_path):
    for number in range(2):
        rows = [eval_row(f"{number}", ["yes", f"no {number}"], ["", ""])]
        parquet(tmp_path / "VOC" / f"test-0000{number}-of-00002.parquet", rows)
    (task,) = mmeb_eval.read_tasks(at(tmp_path))
    assert task.name == "VOC/test/text-to-text"
    assert [(q.content[0].text, q.candidates) for q in task.queries] == [("0", (0, 1)), ("1", (0, 2))]


@pytest.mark.parametrize(
    "row",
    [
        eval_row("q", ["a", "b"], [""]),
        eval_row("q", [], []),
        eval_row("q", None, None),
        eval_row(f"{MARK}", ["a"], [""]),
        eval_row("q", [""], ["images/none.png"]),
        eval_row("q", [""], ["../secret.png"]),
    ],
)
def test_a_broken_row_ends_an_evaluation(images, row):
    path = parquet(images / "test.parquet", [eval_row("good", ["yes", "no"], ["", ""]), row])
    with pytest.raises(ValueError, match=r"test\.parquet row 1: "):
        list(mmeb_eval.read_tasks(at(path)))


# texts


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"query": "q", "pos": ["p", "r"], "neg": ["n", "p"], "prompt": "x"}, ("q", ["p", "r"], ["n"])),  # BGE
        ({"anchor": "q", "positive": "p", "negative": "n"}, ("q", ["p"], ["n"])),  # sentence-transformers
        ({"query": "q", "positive": "p", "negative_1": "n", "negative_2": "m"}, ("q", ["p"], ["n", "m"])),
        ({"query": "q", "answer": "p"}, ("q", ["p"], [])),
        ({"query": "q", "positives": ["p"], "negatives": []}, ("q", ["p"], [])),
        (
            {
                "query_id": "7",
                "query": "q",
                "positive_passages": [{"docid": "1", "title": "t", "text": "p"}],
                "negative_passages": [{"docid": "2", "title": "", "text": "n"}],
            },
            ("q", ["t\n\np"], ["n"]),
        ),  # MS MARCO
    ],
)
def test_triplets_of_texts(tmp_path, row, expected):
    paths = [lines(tmp_path / "nli" / f"train.jsonl{packed}", [row]) for packed in ("", ".gz", ".zst")]
    paths.append(parquet(tmp_path / "nli" / "train-00000-of-00001.parquet", [row]))
    for path in paths:
        (pair,) = read(triplets, path)
        assert said(pair) == expected and pair.source == "nli/train", path
    assert [said(pair) for pair in read(triplets, tmp_path)] == [expected] * 4


def test_columns_of_triplets_may_be_named(tmp_path):
    columns = {"query": "frage", "positive": "antwort", "negatives": "falsch"}
    row = {"frage": "q", "antwort": "p", "falsch": ["n"], "query": "not this"}
    for path in (lines(tmp_path / "a.jsonl", [row]), parquet(tmp_path / "b.parquet", [row])):
        assert said(*read(triplets, path, columns=columns)) == ("q", ["p"], ["n"])
    with pytest.raises(
        ValueError, match=r"b\.parquet: no column positive or positives .* for 'positive'; it has frage"
    ):
        read(triplets, tmp_path / "b.parquet")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"query": "q"}, "malformed_row"),
        ({"query": "q", "pos": []}, "no_positive"),
        ({"query": "q", "pos": None}, "no_positive"),
        ({"query": ["instruction", "q"], "pos": ["instruction", "p"]}, "malformed_row"),
        ({"query": "q", "pos": [["instruction", "p"]]}, "malformed_row"),
        ({"query": 7, "pos": 8}, "malformed_row"),  # ids of texts that are elsewhere
        ({"query": "q", "pos": [{"docid": "1"}]}, "malformed_row"),
        ({"query": "q", "pos": "p", "neg": {"bm25": [1]}}, "malformed_row"),
        ({"query": "q", "pos": "\ud800"}, "malformed_text"),
        ({"query": "", "pos": "p"}, "empty"),
        ({"query": "q", "pos": ["p", ""]}, "empty"),
        (b"{not json\n", "malformed_json"),
        (b"[1]\n", "malformed_json"),
    ],
)
def test_broken_triplets_are_named(tmp_path, row, reason):
    good = {"query": "q", "pos": ["p"]}
    items = read(triplets, lines(tmp_path / "x.jsonl", [good, row, good]))
    assert reasons(valid_pairs(items, ImageBounds())) == [None, reason, None]
    assert reason == "empty" or items[1].where.endswith("x.jsonl byte 29")


@pytest.mark.parametrize("adapter", [triplets, pairs_jsonl])
def test_several_units_cover_each_line_once(tmp_path, monkeypatch, adapter):
    monkeypatch.setattr(listing, "UNIT_BYTES", 100)
    rows = [{"query": f"{i} " + "x" * (i % 37), "positive": "p"} for i in range(60)]
    path = lines(tmp_path / "x.jsonl", rows)
    assert len(adapter.list_units(at(path))) > 20
    assert [pair.query[0].text for pair in read(adapter, path)] == [row["query"] for row in rows]


def test_several_units_cover_each_row_once(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "UNIT_BYTES", 1)
    rows = [pair_row(qry=f"{i}", query=f"{i}", positive="p") for i in range(25)]
    path = parquet(tmp_path / "x.parquet", rows, row_group_size=4)
    for adapter in (mmeb, triplets):
        assert [unit["rows"] for unit in adapter.list_units(at(path))] == [4] * 6 + [1]
        assert [pair.query[0].text for pair in read(adapter, path)] == [f"{i}" for i in range(25)]


# one's own lines


def test_lines_of_ones_own(images):
    uri = "data:image/png;base64," + base64.encodebytes(B).decode()
    rows = [
        {"query": "q", "positive": "p"},
        {"query": {"text": "what?", "image": "images/a.png"}, "positives": ["p", {"image": uri}], "task": "a/b"},
        {
            "query": [{"text": "from"}, {"image": "images/a.png"}, {"text": "to"}, {"image": "images/b.png"}],
            "positive": {"text": "p", "image": None},
            "negatives": ["n", "", "p", "n"],
            "group": "g",
            "task": None,
        },
    ]
    own = "set/mine"
    expected = [
        Pair(own, (text("q"),), ((text("p"),),)),
        Pair("a/b", (IMAGE_A, text("what?")), ((text("p"),), (IMAGE_B,))),
        Pair(own, (text("from"), IMAGE_A, text("to"), IMAGE_B), ((text("p"),),), ((text("n"),),), "g"),
    ]
    for packed in ("", ".gz", ".zst"):
        assert read(pairs_jsonl, lines(images / f"mine.jsonl{packed}", rows)) == expected
    elsewhere = lines(images.parent / "lines" / "mine.jsonl", rows)
    assert reasons(read(pairs_jsonl, elsewhere)) == [None, "image_missing", "image_missing"]
    assert reasons(read(pairs_jsonl, elsewhere, images=str(images))) == [None] * 3


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"negative": "n"}, "unknown_key"),
        ({"query": {"txt": "q"}}, "unknown_key"),
        ({"query": [{"text": "q", "image": "images/a.png"}]}, "malformed_row"),
        ({"query": ["a", "b"]}, "malformed_row"),
        ({"query": []}, "malformed_row"),
        ({"query": {}}, "malformed_row"),
        ({"query": None}, "malformed_row"),
        ({"query": 5}, "malformed_row"),
        ({"query": {"text": 5}}, "malformed_row"),
        ({"query": {"image": ""}}, "malformed_row"),
        ({"query": {"image": "../secret.png"}}, "image_missing"),
        ({"query": {"image": "data:image/png;base64,@@@"}}, "malformed_row"),
        ({"query": {"image": "data:image/png,raw"}}, "malformed_row"),
        ({"positive": ["a", "b"]}, "malformed_row"),
        ({"positives": ["p"]}, "malformed_row"),
        ({"negatives": "n"}, "malformed_row"),
        ({"task": "../../elsewhere"}, "malformed_row"),
        ({"task": "/etc"}, "malformed_row"),
        ({"task": "a//b"}, "malformed_row"),
        ({"task": "a\n"}, "malformed_row"),
        ({"task": ""}, "malformed_row"),
        ({"group": 7}, "malformed_row"),
        ({"query": " "}, "empty"),
        ({"query": "\ud800"}, "malformed_text"),
        ({"query": {"image": "data:image/png;base64,AAAA"}}, "not_an_image"),
    ],
)
def test_broken_lines_of_ones_own_are_named(images, changes, reason):
    good = {"query": "q", "positive": "p"}
    items = read(pairs_jsonl, lines(images / "mine.jsonl", [good, good | changes, good]))
    found = reasons(valid_pairs(items, ImageBounds()))
    assert found[::2] == [None, None]
    assert found[1] == reason
    if reason == "unknown_key":
        assert re.search("'negative'|'txt'", items[1].detail)


def test_the_guide_says_what_is_so(tmp_path):
    """Every example row of the guide is read by the layout under whose heading it stands."""
    guide = (ROOT / "docs" / "your_own_pairs.md").read_text()
    section, *_ = re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL)
    for role, registry in (("train", sources.PAIRS), ("evaluate", sources.TASKS)):
        for source in yaml.safe_load(section)["pairs"][role]:
            assert "images" not in source or "images" in sources.options(registry, source["layout"])
    (tmp_path / "boards").mkdir()
    (tmp_path / "boards" / "front.png").write_bytes(A)
    (tmp_path / "boards" / "back.png").write_bytes(B)
    examples = re.findall(r"^## `(\w+)`.*?```json\n(.*?)```", guide, re.DOTALL | re.MULTILINE)
    assert [layout for layout, _ in examples] == ["jsonl", "triplets"]
    for layout, example in examples:
        path = tmp_path / f"{layout}.jsonl"
        path.write_text(example)
        items = read({"jsonl": pairs_jsonl, "triplets": triplets}[layout], path)
        assert len(items) >= 3 and reasons(valid_pairs(items, ImageBounds())) == [None] * len(items)


@needs_kicad
def test_kicad_pairs():
    (unit,) = mmeb.list_units(at(KICAD / "mmeb_train.parquet"))
    assert unit["rows"] == 494
    items = list(valid_pairs(read(mmeb, KICAD / "mmeb_train.parquet"), ImageBounds()))
    assert len(items) == 494 and reasons(items) == [None] * 494
    assert {p.source for p in items} == {"kicad/mmeb_train/text-to-image", "kicad/mmeb_train/image-to-text"}
    assert all(len(p.positives) == 1 for p in items) and any(p.negatives for p in items)


@needs_kicad
def test_kicad_queries():
    location = at(KICAD / "mmeb_eval.parquet")
    tasks = list(mmeb_eval.read_tasks(location))
    assert sum(len(t.queries) for t in tasks) == 61
    raw = pq.read_table(location.path).to_pylist()
    asked = {}  # some questions are asked twice, with different answers
    for task in tasks:
        check_task(task, ImageBounds())
        for query in task.queries:
            asked.setdefault(query.content, []).append((query, task))
    for row in raw:
        query, task = asked[mmeb.content(location, location.path, row["qry_text"], row["qry_img_path"])].pop(0)
        right = mmeb.content(location, location.path, row["tgt_text"][0], row["tgt_img_path"][0])
        assert [task.candidates[i] for i in query.positives] == [right]
        assert len(query.candidates) == len(set(zip(row["tgt_text"], row["tgt_img_path"], strict=True)))
