"""What is written comes back equal: batches as bytes, documents, pairs and tasks as tables."""

import hashlib
import io
from dataclasses import fields, is_dataclass

import numpy as np
import pyarrow.parquet as pq
import pytest
from samples import CONTENTS, png, row_of, text, words

from moca_core.data import schema
from moca_core.data.codec import from_bytes, to_bytes
from moca_core.data.image_files import ImageBounds
from moca_core.data.masking import mask, next_token
from moca_core.data.pairs import collate_pairs
from moca_core.data.validate import check_task, valid_documents, valid_pairs
from moca_core.types import Document, EvalTask, Pair, Query, Rejected, Segment, content_id


def assert_same(one, other):
    assert type(one) is type(other)
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if is_dataclass(a):
            assert_same(a, b)
        elif isinstance(a, np.ndarray):
            assert (a.dtype, a.shape) == (b.dtype, b.shape), field.name
            np.testing.assert_array_equal(a, b)
        else:
            assert (type(a), a) == (type(b), b), field.name


TEXT = ((text(words(9)),), (text(words(4, 1)),))


@pytest.mark.parametrize("contents", [CONTENTS, TEXT], ids=["mixed", "text"])
def test_masked_batches_come_back(renderer, spec, contents):
    row = row_of(contents, renderer)
    key = {"seed": 2**40, "epoch": 1}
    for batch in (mask(row, spec, mlm_ratio=0.4, mae_ratio=0.5, **key), next_token(row, spec, **key)):
        assert_same(batch, from_bytes(to_bytes(batch)))
    assert isinstance(to_bytes(batch), bytes)


@pytest.mark.parametrize("negatives", [0, 2])
def test_pair_batches_come_back(renderer, negatives):
    pairs = [Pair("t", CONTENTS[0], (CONTENTS[2],), (CONTENTS[1],)), Pair("t", CONTENTS[4], (TEXT[0],))]
    batch = collate_pairs(pairs, renderer, num_negatives=negatives, sources=["t"], key=(1,))
    assert_same(batch, from_bytes(to_bytes(batch)))


def test_the_order_in_memory_is_not_content(renderer, spec):
    batch = mask(row_of(CONTENTS, renderer), spec, seed=1, epoch=0, mlm_ratio=0.4, mae_ratio=0.5)
    batch.stream.pixels = np.asfortranarray(batch.stream.pixels)
    batch.stream.position_ids = batch.stream.position_ids[:, ::-1][:, ::-1]
    assert_same(batch, from_bytes(to_bytes(batch)))


def through_parquet(table):
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return pq.read_table(io.BytesIO(buffer.getvalue()))


def test_documents_come_back():
    documents = [Document(f"source {i}", content, f"file row {i}") for i, content in enumerate(CONTENTS)]
    table = through_parquet(schema.documents_to_table(documents))
    assert table.schema.equals(schema.CORPUS)
    read = list(schema.table_to_documents(table))
    assert read == documents and [d.where for d in read] == [d.where for d in documents]
    assert table["doc_id"].to_pylist() == [d.doc_id for d in documents]


def test_pairs_come_back():
    pairs = [
        Pair("a", CONTENTS[0], (CONTENTS[1], CONTENTS[2]), (CONTENTS[3],), "group", "file row 3"),
        Pair("b", CONTENTS[1], (CONTENTS[4],)),
    ]
    table = through_parquet(schema.pairs_to_table(pairs))
    back = [schema.row_to_pair(row) for row in table.to_pylist()]
    assert back == pairs and [pair.where for pair in back] == [pair.where for pair in pairs]


def test_tasks_come_back():
    queries = (
        Query(CONTENTS[0], (1, 2), (0, 1, 2)),
        Query(CONTENTS[1], (0,)),
        Query(CONTENTS[1], (0, 2), None, (2.0, 0.5)),
    )
    task = EvalTask("name", queries, CONTENTS[2:])
    asked, candidates = (through_parquet(table).to_pylist() for table in schema.task_to_tables(task))
    assert tuple(schema.rows_to_content(row["content"]) for row in candidates) == task.candidates
    assert tuple(schema.rows_to_content(row["content"]) for row in asked) == tuple(q.content for q in queries)
    for row, query in zip(asked, queries, strict=True):
        lists = (query.positives, query.candidates, query.grades)
        assert [row[name] for name in ("positives", "candidates", "grades")] == [v and list(v) for v in lists]
    ids = [row["id"].hex() for row in (*asked, *candidates)]
    assert ids == [content_id(c) for c in (*(q.content for q in queries), *task.candidates)]


def test_rejections_come_back():
    rejected = [Rejected("empty", "no text", "file row 1")]
    assert schema.rejected_to_table(rejected).to_pylist() == [vars(rejected[0])]
    assert schema.rejected_to_table([]).schema == schema.REJECTED


def test_doc_ids_are_stable_and_tell_contents_apart():
    data = png(30, 30)
    contents = [
        (text("ab"),),
        (text("a"), text("b")),
        (text("b"), text("a")),
        (Segment(image=b"ab"),),
        (text("a"), Segment(image=data)),
        (Segment(image=data), text("a")),
        (text("1:a"),),
    ]
    ids = [content_id(c) for c in contents]
    assert len(set(ids)) == len(ids) and all(len(i) == 32 for i in ids)
    assert ids[1] == hashlib.sha256(b"t1:at1:b").hexdigest()[:32]
    assert Document("x", contents[0]).doc_id == Document("y", contents[0]).doc_id == ids[0]


def test_a_segment_is_one_thing():
    for given in ({}, {"text": "a", "image": b"b"}):
        with pytest.raises(AssertionError):
            Segment(**given)


BAD = {
    "empty": (text("  \n"),),
    "image_missing": (text("a"), Segment(image=b"")),
    "not_an_image": (text("a"), Segment(image=b"no image")),
    "image_truncated": (Segment(image=png(80, 80)[:-400]),),
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_contents_are_set_aside_by_reason(reason):
    given = Rejected("before", "d", "w")
    document, good = Document("s", BAD[reason], "file row 7"), Document("s", CONTENTS[2])
    kept = list(valid_documents([given, document, good], ImageBounds()))
    assert (kept[0], kept[2]) == (given, good)
    assert kept[1].reason == reason and kept[1].where == "file row 7"
    pairs = [
        Pair("s", BAD[reason], (CONTENTS[0],)),
        Pair("s", CONTENTS[0], (CONTENTS[1], BAD[reason])),
        Pair("s", CONTENTS[0], (CONTENTS[1],), (BAD[reason],)),
        Pair("s", CONTENTS[0], (CONTENTS[1],)),
    ]
    kept = list(valid_pairs([given, *pairs], ImageBounds()))
    assert [getattr(k, "reason", None) for k in kept] == ["before", reason, reason, reason, None]
    with pytest.raises(ValueError, match=f"task t, candidate 1: {reason}"):
        check_task(EvalTask("t", (Query(CONTENTS[0], (0,)),), (CONTENTS[1], BAD[reason])), ImageBounds())


@pytest.mark.parametrize(
    "query",
    [
        Query(CONTENTS[0], ()),
        Query(CONTENTS[0], (2,)),
        Query(CONTENTS[0], (0,), (1,)),
        Query(CONTENTS[0], (0, 0)),
        Query(CONTENTS[0], (0, 1), grades=(1.0,)),
        Query(CONTENTS[0], (0,), grades=(0.0,)),
        Query(CONTENTS[0], (0,), grades=(float("nan"),)),
    ],
)
def test_a_task_without_a_right_answer_is_refused(query):
    check_task(EvalTask("t", (Query(CONTENTS[0], (0, 1), (1, 0)),), CONTENTS[1:3]), ImageBounds())
    with pytest.raises(ValueError, match=r"task t, query 0: (right answers|grades)"):
        check_task(EvalTask("t", (query,), CONTENTS[1:3]), ImageBounds())
    with pytest.raises(ValueError, match="no queries"):
        check_task(EvalTask("t", (), CONTENTS[1:3]), ImageBounds())
