"""The tables on storage: Corpus, PackedCorpus, PairSet, evaluation tasks. Encoded images, plain Arrow types, no pickles."""

from collections.abc import Iterable, Iterator

import pyarrow as pa

from moca_core.data.keys import evaluation_keys, keys_of, pair_key
from moca_core.types import Content, Document, EvalTask, Pair, Rejected, Segment, content_id

CONTENT = pa.list_(pa.struct([("text", pa.string()), ("image", pa.binary())]))

CORPUS = pa.schema([("doc_id", pa.string()), ("source", pa.string()), ("where", pa.string()), ("content", CONTENT)])

REJECTED = pa.schema([("reason", pa.string()), ("detail", pa.string()), ("where", pa.string())])

GROUPS = pa.schema(  # the row groups of the Corpus: where they are, what they hold, which source of the recipe they came from
    [
        ("part", pa.int32()),
        ("group", pa.int32()),
        ("source", pa.int32()),
        ("first_row", pa.int32()),
        ("documents", pa.int32()),
        ("bytes", pa.int64()),
    ]
)

KEY = pa.binary(16)

KEYS = pa.schema(  # what a part of the Corpus holds, by key; `row` counts in the part, `segment` in the document (-1: all of it)
    [
        ("row", pa.int32()),
        ("segment", pa.int32()),
        ("kind", pa.dictionary(pa.int8(), pa.string())),
        ("key", KEY),
    ]
)

EVALUATION_KEYS = pa.schema(  # of evaluation tasks: "content" that no document may hold, "pair" that is a question and its right answer
    [("kind", pa.string()), ("key", KEY)]
)

DROPPED = pa.schema(  # what the cleaning takes out, and why
    [
        ("part", pa.int32()),
        ("row", pa.int32()),
        ("segment", pa.int32()),
        ("reason", pa.string()),
        ("key", KEY),
    ]
)

INDEX = pa.schema([("file", pa.int32()), ("row", pa.int32()), ("tokens", pa.int32()), ("cost_flops", pa.float64())])

PACKED = pa.schema(  # one row is one pack: its sequences laid end to end
    [
        ("piece_ids", pa.list_(pa.string())),
        ("segment_lengths", pa.list_(pa.int32())),
        ("input_ids", pa.list_(pa.int32())),
        ("images", pa.list_(pa.binary())),
        ("grid_thw", pa.list_(pa.list_(pa.int32(), 3))),
        ("cost_flops", pa.float64()),
    ]
)

PAIRS = pa.schema(
    [
        ("source", pa.string()),
        ("where", pa.string()),
        ("query", CONTENT),
        ("positives", pa.list_(CONTENT)),
        ("negatives", pa.list_(CONTENT)),
        ("group", pa.string()),
    ]
)

QUERIES = pa.schema(  # of an evaluation task; `id` is the hash of the content
    [
        ("id", KEY),
        ("content", CONTENT),
        ("positives", pa.list_(pa.int64())),
        ("grades", pa.list_(pa.float64())),
        ("candidates", pa.list_(pa.int64())),
    ]
)

CANDIDATES = pa.schema([("id", KEY), ("content", CONTENT)])


def content_to_rows(content: Content) -> list[dict]:
    return [{"text": segment.text, "image": segment.image} for segment in content]


def rows_to_content(rows: list[dict]) -> Content:
    return tuple(Segment(**row) for row in rows)


def documents_to_table(documents: Iterable[Document]) -> pa.Table:
    rows = [
        {"doc_id": d.doc_id, "source": d.source, "where": d.where, "content": content_to_rows(d.content)}
        for d in documents
    ]
    return pa.Table.from_pylist(rows, schema=CORPUS)


def table_to_documents(table: pa.Table) -> Iterator[Document]:
    for row in table.to_pylist():
        yield Document(row["source"], rows_to_content(row["content"]), row["where"])


def keys_to_table(documents: Iterable[Document], first_row: int) -> pa.Table:
    """KEYS of documents that stand from `first_row` on in their part."""
    rows = []
    for row, document in enumerate(documents, first_row):
        keys = keys_of(document.content)
        rows.append({"row": row, "segment": -1, "kind": "document", "key": keys.whole})
        rows += [{"row": row, "segment": place, "kind": "image", "key": key} for place, key in keys.images]
        if keys.text is not None:
            rows.append({"row": row, "segment": -1, "kind": "text", "key": keys.text})
    return pa.Table.from_pylist(rows, schema=KEYS)


def evaluation_keys_to_table(task: EvalTask) -> pa.Table:
    contents = [*(query.content for query in task.queries), *task.candidates]
    rows = [{"kind": "content", "key": key} for content in contents for key in evaluation_keys(content)]
    answered = [(query.content, task.candidates[place]) for query in task.queries for place in query.positives]
    rows += [{"kind": "pair", "key": pair_key(query, answer)} for query, answer in answered]
    return pa.Table.from_pylist(rows, schema=EVALUATION_KEYS)


def rejected_to_table(rejected: Iterable[Rejected]) -> pa.Table:
    return pa.Table.from_pylist([vars(r) for r in rejected], schema=REJECTED)


def pairs_to_table(pairs: Iterable[Pair]) -> pa.Table:
    rows = [
        {
            "source": pair.source,
            "where": pair.where,
            "query": content_to_rows(pair.query),
            "positives": [content_to_rows(c) for c in pair.positives],
            "negatives": [content_to_rows(c) for c in pair.negatives],
            "group": pair.group,
        }
        for pair in pairs
    ]
    return pa.Table.from_pylist(rows, schema=PAIRS)


def row_to_pair(row: dict) -> Pair:
    return Pair(
        row["source"],
        rows_to_content(row["query"]),
        tuple(rows_to_content(c) for c in row["positives"]),
        tuple(rows_to_content(c) for c in row["negatives"]),
        row["group"],
        row["where"],
    )


def task_to_tables(task: EvalTask) -> tuple[pa.Table, pa.Table]:
    """(queries, candidates) of an evaluation task."""
    queries = [
        {"positives": q.positives, "grades": q.grades, "candidates": q.candidates, **_identified(q.content)}
        for q in task.queries
    ]
    candidates = [_identified(content) for content in task.candidates]
    return pa.Table.from_pylist(queries, schema=QUERIES), pa.Table.from_pylist(candidates, schema=CANDIDATES)


def _identified(content: Content) -> dict:
    return {"id": bytes.fromhex(content_id(content)), "content": content_to_rows(content)}
