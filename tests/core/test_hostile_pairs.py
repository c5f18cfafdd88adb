"""Rows that nobody meant well: whatever they hold, a pair layout makes a pair of them or a rejection, and nothing else happens."""

import copy
import json
import random

import pyarrow as pa
import pytest
from layout_files import at, lines, parquet, read, reasons
from samples import png

from moca_core.data.image_files import ImageBounds
from moca_core.data.validate import valid_pairs
from moca_core.sources import beir, mmeb, mmeb_eval, pairing, pairs_jsonl, triplets
from moca_core.types import Pair, Rejected, Segment, content_id

MUTATIONS = 300
STRANGE = (
    *(None, True, -1, 0, 2**70, 1.5, float("nan"), float("inf"), "", " ", "\0", "\ud800", "é", "x" * 10_000, "🙂"),
    *("[", "['", "[]", "['a', 1]", "[" * 3000, "[-" * 2000, "['\\ud800']", "[1, [2]]", "[b'x']", "['a\0']", "[f(x)]"),
    *("../../etc/passwd", "/etc/passwd", ".", "..", "a/" * 3000, "\\\\host", "s3://b/k", "data:,", "data:;base64,####"),
    *(
        "<|image_1|>",
        "<|image_1|>" * 3,
        [],
        {},
        [[]],
        [None],
        [{}],
        {"": 0},
        {"text": None},
        {"image": 3},
        {"bytes": 1},
    ),
    *({"text": ["a"]}, {"bytes": "x", "path": 7}, ["a", 1, None], [[["deep"]]], {"a": {"b": [{"c": None}]}}),
)
ROWS = {
    "jsonl": {
        "query": [{"text": "q"}, {"image": "a.png"}],
        "positives": ["p"],
        "negatives": ["n"],
        "task": "t",
        "group": "g",
    },
    "triplets": {"query": "q", "pos": ["p"], "neg": [{"title": "t", "text": "n"}], "negative_1": "m"},
    "mmeb": {
        **{"qry": "<|image_1|> q", "qry_image_path": "a.png", "pos_text": "p", "pos_image_path": ""},
        **{"neg_text": "['n']", "neg_image_path": "['']"},
    },
}


def mutated(rng, value):
    """A copy in which one to three places, however deep, hold something else, are missing or are said twice."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        place = value
        while True:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(place[key], dict | list) and rng.random() < 0.6:
                place = place[key]
                continue
            kind = rng.random()
            if kind < 0.1:
                del place[key]
            elif kind < 0.2 and isinstance(place, dict):
                place[rng.choice(("extra", "", "\ud800"))] = place.pop(key)
            else:
                place[key] = copy.deepcopy(rng.choice(STRANGE))
            break
    return value


def check(items):
    """Pairs and rejections that can be stored: their texts have UTF-8, their tasks lead nowhere else."""
    for item in valid_pairs(items, ImageBounds()):
        assert isinstance(item, Pair | Rejected)
        if isinstance(item, Rejected):
            assert item.reason and item.where.encode() and item.detail.encode() is not None
        else:
            assert not item.source.startswith("/") and ".." not in item.source.split("/")
            assert all(content_id(side) for side in (item.query, *item.positives, *item.negatives))


@pytest.mark.parametrize(("adapter", "name"), [(pairs_jsonl, "jsonl"), (triplets, "triplets")])
def test_lines(tmp_path, adapter, name):
    rng = random.Random(name)
    (tmp_path / "a.png").write_bytes(png(60, 60))
    rows = [mutated(rng, ROWS[name]) for _ in range(MUTATIONS)]
    rows += [json.dumps(mutated(rng, ROWS[name])).encode()[: rng.randint(0, 60)] + b"\n" for _ in range(50)]
    rows += [bytes(rng.randbytes(40).replace(b"\n", b"")) + b"\n" for _ in range(50)]
    items = read(
        adapter,
        lines(
            tmp_path / "x.jsonl", [*rows, ROWS["triplets"] if name == "triplets" else {"query": "q", "positive": "p"}]
        ),
    )
    assert isinstance(items[-1], Pair) and len(items) > MUTATIONS
    check(items)


@pytest.mark.parametrize(("adapter", "name"), [(mmeb, "mmeb"), (triplets, "triplets")])
def test_parquet(tmp_path, adapter, name):
    """Every file of its own types; a file that lacks a column is refused as a whole, by name."""
    rng = random.Random(name)
    (tmp_path / "a.png").write_bytes(png(60, 60))
    outcomes = set()
    for number in range(MUTATIONS):
        try:
            path = parquet(tmp_path / f"{number}.parquet", [mutated(rng, ROWS[name])])
        except (pa.ArrowException, UnicodeEncodeError, OverflowError):  # nothing that a Parquet file can hold
            continue
        try:
            items = read(adapter, path)
        except ValueError as error:
            assert f"{number}.parquet: no column" in str(error)
            items = []
        check(items)
        outcomes |= {type(item) for item in items}
    assert outcomes == {Pair, Rejected}


def test_evaluation_rows(tmp_path):
    """A task or a ValueError that names the file."""
    rng = random.Random("eval")
    row = {"qry_text": "q", "qry_img_path": "", "tgt_text": ["a", "b"], "tgt_img_path": ["", ""]}
    refused = 0
    for number in range(MUTATIONS):
        try:
            path = parquet(tmp_path / f"{number}.parquet", [mutated(rng, row)])
        except (pa.ArrowException, UnicodeEncodeError, OverflowError):
            continue
        try:
            list(mmeb_eval.read_tasks(at(path)))
        except ValueError as error:
            assert f"{number}.parquet" in str(error)
            refused += 1
    assert refused > 50


def test_beir(tmp_path):
    rng = random.Random("beir")
    document, query = {"_id": "d", "title": "t", "text": "x", "image": ""}, {"_id": "q", "text": "y"}
    judgment = {"query-id": "q", "corpus-id": "d", "score": 1}
    for number in range(MUTATIONS):
        folder = tmp_path / f"{number}"
        lines(folder / "corpus.jsonl", [mutated(rng, document), document])
        lines(folder / "queries.jsonl", [mutated(rng, query), query])
        lines(folder / "qrels" / "train.jsonl", [mutated(rng, judgment), judgment])
        (folder / "qrels" / "test.tsv").write_bytes(b"q\td\t1\n" + rng.randbytes(30))
        items = read(beir, folder)
        assert items
        check(items)
        try:
            list(beir.read_tasks(at(folder)))
        except ValueError as error:
            assert str(folder) in str(error) or f"task {number}/test" in str(error)


def test_a_pair_is_bounded_however_often_it_names_a_file(tmp_path, monkeypatch):
    image = png(60, 60)
    (tmp_path / "a.png").write_bytes(image)
    row = {"query": "q", "positive": "p", "negatives": [{"image": "a.png"}] * 100}
    path = lines(tmp_path / "mine.jsonl", [row])
    assert [pair.negatives for pair in read(pairs_jsonl, path)] == [((Segment(image=image),),)]
    monkeypatch.setattr(pairing, "MAX_CONTENT_BYTES", 50 * len(image))
    assert reasons(read(pairs_jsonl, path)) == ["pair_too_large"]
