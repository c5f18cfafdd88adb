"""Triplets of texts, as E5, BGE, sentence-transformers and MS MARCO have them: a query, right answers and wrong ones.

Parquet or JSON lines. An answer is a text, an object with a text (and a title), or a list of those; negatives may also stand
in columns of their own, negative_1, negative_2 and so on. A task is the folder and the file without its shard number.
"""

from collections.abc import Iterator
from typing import Any

from moca_core.sources import Location
from moca_core.sources.fields import BadRow, as_text
from moca_core.sources.pairing import pair_of, table_rows, table_units, task_name
from moca_core.sources.rows import read_rows
from moca_core.types import Content, Pair, Rejected, Segment

NAMED = {
    "query": ("query", "anchor", "question"),
    "positive": ("positive", "positives", "pos", "positive_passages", "pos_doc", "answer"),
    "negatives": ("negatives", "negative", "neg", "negative_passages", "neg_doc"),
}
NUMBERED = tuple(f"negative_{number}" for number in range(1, 101))  # public sets have up to 50
COLUMNS = NAMED | {name: (name,) for name in NUMBERED}
OPTIONAL = ("negatives", *NUMBERED)
OPTIONS = {"columns": tuple(NAMED)}
list_units = table_units


def read_pairs(location: Location, unit: dict) -> Iterator[Pair | Rejected]:
    task = task_name(unit["path"])

    def pair(row: dict) -> Pair:
        query = (Segment(text=as_text(row["query"], "query")),)
        negatives = [side for role in OPTIONAL for side in answers(row[role], role)]
        return pair_of(task, query, answers(row["positive"], "positive"), negatives)

    return read_rows(table_rows(location, unit, COLUMNS, OPTIONAL), pair)


def answers(value: Any, role: str) -> list[Content]:
    """The texts of a field that holds one, several or none. Raises BadRow for anything else."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [(Segment(text=answer_text(item, role)),) for item in values]


def answer_text(value: Any, role: str) -> str:
    """A text, or title and text of an object, with a blank line between. Raises BadRow for anything else."""
    if not isinstance(value, dict):
        return as_text(value, role)
    if "text" not in value:
        raise BadRow("malformed_row", f"{role}: an object without a text; it has {', '.join(map(str, value))[:200]}")
    return titled(value.get("title"), value["text"], role)


def titled(title: Any, text: Any, role: str) -> str:
    """Title and text with a blank line between, either of which may be missing. Raises BadRow for what is no text."""
    return "\n\n".join(filter(None, [as_text(title, f"{role} title"), as_text(text, role)]))
