"""BEIR folders: every judged query is one pair, every split to evaluate one task, whatever files the folder is made of."""

import numpy as np
import pytest
from layout_files import at, lines, parquet, read, reasons, said
from samples import png, text

from moca_core.data.image_files import ImageBounds
from moca_core.data.validate import check_task
from moca_core.sources import beir, beir_files
from moca_core.types import Pair, Query, Rejected, Segment

CORPUS = [
    {"_id": "d1", "title": "Title", "text": "one", "metadata": {}},
    {"_id": "d2", "title": "", "text": "two"},
    {"_id": "d3", "title": "Empty", "text": ""},
    {"_id": "d4", "title": "", "text": ""},
    {"_id": "d5", "text": "two"},
]
QUERIES = [{"_id": f"q{i}", "text": f"query {i}", "metadata": {}} for i in range(1, 6)]
TRAIN = [("q1", "d1", 1), ("q1", "d2", 2), ("q2", "d3", 1), ("q2", "d1", 0), ("q1", "d5", 1)]
TEST = [("q3", "d2", 1), ("q3", "d1", 0), ("q4", "d1", 1), ("q4", "d5", 3), ("q5", "d1", 0)]
A, B = png(60, 60, 1), png(80, 60, 2)


def tsv(path, judgments, header=b"query-id\tcorpus-id\tscore\n"):
    lines(path, [header, *(("\t".join(map(str, judgment)) + "\n").encode() for judgment in judgments)])


def write(folder, packed="", queries=QUERIES, train=TRAIN, test=TEST):
    lines(folder / f"corpus.jsonl{packed}", CORPUS)
    lines(folder / f"queries.jsonl{packed}", queries)
    for split, judgments in {"train": train, "test": test}.items():
        if judgments:
            tsv(folder / "qrels" / f"{split}.tsv{packed}", judgments)
    return folder


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_training_pairs(tmp_path, packed):
    pairs = read(beir, write(tmp_path / "scifact", packed))
    assert [said(pair) for pair in pairs] == [
        ("query 1", ["Title\n\none", "two"], []),  # d2 and d5 say the same
        ("query 2", ["Empty"], ["Title\n\none"]),
    ]
    assert {pair.source for pair in pairs} == {"scifact/train"}
    assert pairs[0].where.endswith(f"qrels/train.tsv{packed} query q1")


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_the_task(tmp_path, packed):
    (task,) = beir.read_tasks(at(write(tmp_path / "scifact", packed)))
    assert task.name == "scifact/test"
    assert task.candidates == ((text("Title\n\none"),), (text("two"),), (text("Empty"),))
    # q5 has no right answer; what is empty is no candidate
    assert task.queries == (Query((text("query 3"),), (1,)), Query((text("query 4"),), (0, 1), grades=(1, 3)))
    check_task(task, ImageBounds())


def test_several_datasets_in_a_folder(tmp_path):
    write(tmp_path / "scifact", train=())
    write(tmp_path / "cqa" / "android", ".gz", test=())
    write(tmp_path / "cqa" / "gis", test=())
    tsv(tmp_path / "cqa" / "gis" / "qrels" / "dev.tsv", TEST)
    lines(tmp_path / "notes" / "corpus.jsonl", CORPUS)  # not a dataset
    assert [task.name for task in beir.read_tasks(at(tmp_path))] == ["cqa/gis/dev", "scifact/test"]
    assert [pair.source for pair in read(beir, tmp_path)] == ["cqa/android/train"] * 2 + ["cqa/gis/train"] * 2
    with pytest.raises(ValueError, match="no qrels/train there"):
        beir.list_units(at(tmp_path / "scifact"))
    with pytest.raises(ValueError, match="no qrels/test or qrels/dev there"):
        list(beir.read_tasks(at(tmp_path / "cqa" / "android")))
    with pytest.raises(ValueError, match="no folder with corpus, queries, qrels there"):
        beir.list_units(at(tmp_path / "notes"))


@pytest.mark.parametrize("score_type", [int, float])
@pytest.mark.parametrize(("query_id", "corpus_id"), [("query-id", "corpus-id"), ("query_id", "corpus_id")])
def test_pages_as_vidore_has_them(tmp_path, score_type, query_id, corpus_id):
    """Versions 2 and 3: numbers as ids, images as structs, a folder for each part, other columns that mean nothing here."""
    pages = [
        {corpus_id: i, "image": {"bytes": image, "path": f"{i}.png"}, "doc-id": "x"} for i, image in ((7, A), (8, B))
    ]
    for i, page in enumerate(pages):
        parquet(tmp_path / "esg" / "corpus" / f"test-0000{i}-of-00002.parquet", [page])
    asked = [{query_id: 1, "query": "where?", "language": "en"}, {query_id: 2, "query": "what?", "language": "en"}]
    parquet(tmp_path / "esg" / "queries" / "test-00000-of-00001.parquet", asked)
    judged = [
        {query_id: q, corpus_id: c, "score": score_type(s), "answer": "x"}
        for q, c, s in ((1, 8, 1), (2, 7, 2), (2, 8, 1))
    ]
    parquet(tmp_path / "esg" / "qrels" / "test-00000-of-00001.parquet", judged)
    (task,) = beir.read_tasks(at(tmp_path / "esg"))
    assert task.candidates == ((Segment(image=A),), (Segment(image=B),))
    assert task.queries == (Query((text("where?"),), (1,)), Query((text("what?"),), (0, 1), grades=(2, 1)))
    assert task.name == "esg/test"
    parquet(tmp_path / "esg" / "qrels" / "train" / "0000.parquet", judged)
    first, second = read(beir, tmp_path / "esg")
    assert first.positives == ((Segment(image=B),),) and second.positives == ((Segment(image=A),), (Segment(image=B),))


def test_image_files_and_named_columns(tmp_path):
    folder = tmp_path / "shop"
    lines(folder / "corpus.jsonl", [{"_id": "d", "body": "a lamp", "image_path": "images/a.png"}])
    lines(folder / "queries.jsonl", [{"_id": "q", "text": "like this", "image": "images/b.png"}])
    lines(folder / "qrels" / "train.jsonl", [{"query-id": "q", "corpus-id": "d", "score": 1}])
    (folder / "images").mkdir()
    (folder / "images" / "a.png").write_bytes(A)
    (folder / "images" / "b.png").write_bytes(B)
    (pair,) = read(beir, folder, columns={"text": "body"})
    assert pair.query == (Segment(image=B), text("like this"))
    assert pair.positives == ((Segment(image=A), text("a lamp")),)
    (folder / "images" / "a.png").unlink()
    assert reasons(read(beir, folder)) == ["image_missing"]


def test_of_a_part_that_is_there_twice_one_is_read_and_trec_columns_are_known(tmp_path):
    folder = write(tmp_path / "nl")
    lines(folder / "qrels" / "train.jsonl", [{"query-id": "q1", "corpus-id": "d1", "score": 1}] * 9)
    lines(folder / "corpus" / "corpus.jsonl", CORPUS)
    assert len(read(beir, folder)) == 2
    tsv(folder / "qrels" / "train.tsv", [("q1", 0, "d1", 1), ("q2", 0, "d2", 0)], header=b"")
    first, second = read(beir, folder)
    assert said(first) == ("query 1", ["Title\n\none"], []) and second.reason == "no_positive"


def test_what_is_broken_is_named_once(tmp_path, monkeypatch):
    bad = [
        ("q9", "d1", 1),
        ("q1", "d9", 1),
        ("q2",),
        ("q2", "d1", "high"),
        ("q2", "d1", "nan"),
        ("", "d1", 1),
        ("q3", "d1", 0),
    ]
    folder = write(tmp_path / "set", train=[("q2", "d1", 1), *bad], queries=[b"[]\n", {"text": "no id"}, *QUERIES])
    expected = {
        "queries.jsonl byte 0": "malformed_json",
        "queries.jsonl byte 3": "malformed_row",
        "train.tsv line 5": "malformed_row",
        "train.tsv line 6": "malformed_row",
        "train.tsv line 7": "malformed_row",
        "train.tsv line 8": "malformed_row",
        "train.tsv query q9": "query_missing",
        "train.tsv query q1": "answer_missing",
        "train.tsv query q3": "no_positive",
    }
    for held, most in ((beir_files.HELD_BYTES, 1), (20, 20)):
        monkeypatch.setattr(beir_files, "HELD_BYTES", held)
        assert most / 2 < len(beir.list_units(at(folder))) <= most
        items = read(beir, folder)
        broken = [item for item in items if isinstance(item, Rejected)]
        assert {item.where.rsplit("/", 1)[1]: item.reason for item in broken} == expected
        assert len(items) == len(expected) + 1
        assert [said(item) for item in items if isinstance(item, Pair)] == [("query 2", ["Title\n\none"], [])]


@pytest.mark.parametrize(
    ("judgment", "error"),
    [
        (("q3", "d9", 1), "query q3: its answer d9 is not in the corpus"),
        (("q3", "d4", 1), "query q3: its answer d4 is not in the corpus, or empty"),
        (("q9", "d1", 1), "query q9, which is in none of the files"),
        (("q3", "d1"), "line 7: query, document and score"),
        (("q3", "d1", "?"), "line 7: score: a number was expected"),
    ],
)
def test_a_task_is_whole_or_not_at_all(tmp_path, judgment, error):
    with pytest.raises(ValueError, match=error):
        list(beir.read_tasks(at(write(tmp_path / "set", test=[*TEST, judgment]))))


@pytest.mark.parametrize("title", ["", "of its own"])
def test_a_query_that_stands_among_its_wrong_answers_is_refused(tmp_path, title):
    """ArguAna and Quora: mteb leaves out the candidate that has the query's id; where ids mean nothing that would be wrong."""
    corpus = [{"_id": "d1", "text": "the counter"}, {"_id": "q1", "title": title, "text": "query 1"}]
    write(tmp_path / "arguana", test=[("q1", "d1", 1)])
    lines(tmp_path / "arguana" / "corpus.jsonl", corpus)
    with pytest.raises(ValueError, match=r"task arguana/test, query q1: .* is the query itself .*mteb:ArguAna"):
        list(beir.read_tasks(at(tmp_path / "arguana")))
    for other in ([*corpus[:1], {"_id": "q1", "text": "something else"}], corpus):
        lines(tmp_path / "arguana" / "corpus.jsonl", other)
        judged = [("q1", "d1", 1)] if other is not corpus else [("q1", "d1", 1), ("q1", "q1", 1)]
        tsv(tmp_path / "arguana" / "qrels" / "test.tsv", judged)
        (task,) = beir.read_tasks(at(tmp_path / "arguana"))
        assert len(task.candidates) == 2 and task.queries[0].candidates is None


def test_a_large_corpus_is_read_in_shares(tmp_path, monkeypatch):
    """Each query in exactly one unit; no unit keeps more of the corpus than about its bound."""
    documents = [{"_id": f"d{i}", "title": "", "text": f"{i} " + "x" * 500} for i in range(2000)]
    folder = tmp_path / "big"
    lines(folder / "corpus.jsonl", documents)
    lines(folder / "queries.jsonl.gz", [{"_id": f"q{i}", "text": f"query {i}"} for i in range(1000)])
    tsv(folder / "qrels" / "train.tsv", [(f"q{i}", f"d{2 * i}", 1) for i in range(1000)])
    assert len(beir.list_units(at(folder))) == 1
    monkeypatch.setattr(beir_files, "HELD_BYTES", 100_000)
    units = beir.list_units(at(folder))
    assert 4 <= len(units) <= 8  # half of a corpus of 1.1 MB is asked for
    kept = []
    keep = beir._keep
    monkeypatch.setattr(beir, "_keep", lambda *args: [*keep(*args), kept.append(len(args[-1]))][:0])
    pairs = [pair for unit in units for pair in beir.read_pairs(at(folder), unit)]
    assert sorted(pair.query[0].text for pair in pairs) == sorted(f"query {i}" for i in range(1000))
    assert all(p.positives[0][0].text.startswith(f"{2 * int(p.query[0].text[6:])} ") for p in pairs)
    assert max(kept) * 560 < 1.3 * 100_000


def test_packed_files_are_cut_as_plain_ones(tmp_path, monkeypatch):
    """How much a file holds is told from its beginning, also where that is compressed."""
    monkeypatch.setattr(beir_files, "HELD_BYTES", 100_000)
    monkeypatch.setattr(beir_files, "SAMPLE_BYTES", 600_000)
    random = np.random.default_rng(0)
    documents = [{"_id": f"d{i}", "text": " ".join(map(str, random.integers(0, 10**6, 80)))} for i in range(2000)]
    units = {}
    for packed in ("", ".gz", ".zst"):
        folder = tmp_path / f"as{packed}"
        lines(folder / f"corpus.jsonl{packed}", documents)
        lines(folder / "queries.jsonl", QUERIES)
        tsv(folder / "qrels" / f"train.tsv{packed}", [(f"q{i}", f"d{i}", 1) for i in range(2000)])
        units[packed] = len(beir.list_units(at(folder)))
    assert units[""] == 12 and all(0.7 * 12 <= count <= 1.3 * 12 for count in units.values()), units
