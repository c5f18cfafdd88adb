"""What the cleaning takes out: copies of documents, images that stand everywhere, and what an evaluation set holds."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moca_core.data.schema import DROPPED

WHOLE = -1  # a segment's place that means all of the document


@dataclass(frozen=True)
class CleanRules:
    """`duplicates`: of documents with the same content the first stays. `max_image_copies`: an image stays in its first so many
    documents and leaves the others (logos, icons); null lets all stay. `decontaminate`: images that an evaluation
    set holds leave their documents, and a document without images whose text is a query or a candidate is dropped."""

    duplicates: bool = True
    max_image_copies: int | None = 10
    decontaminate: bool = True

    def __post_init__(self) -> None:
        if self.max_image_copies is not None and self.max_image_copies < 1:
            raise ValueError(f"max_image_copies={self.max_image_copies} must be at least 1, or null to let all stay")


def find_dropped(keys: pa.Table, evaluation: pa.Array, rules: CleanRules) -> pa.Table:
    """DROPPED rows for `keys` (KEYS with a column `part`) that hold every occurrence of each key among them.

    Sorted by part, row and segment; a place appears once, with the first reason of: evaluation, document copy, image copies.
    """
    found = []
    if rules.decontaminate:
        leaked = keys.filter(pc.is_in(keys["key"], value_set=evaluation))
        images = pc.equal(leaked["kind"].cast(pa.string()), "image")
        found.append(_dropped(leaked.filter(images), "image_in_evaluation"))
        found.append(_dropped(leaked.filter(pc.invert(images)), "text_in_evaluation"))
    if rules.duplicates:
        found.append(_dropped(_copies(keys, "document", 1), "duplicate_document"))
    if rules.max_image_copies is not None:
        found.append(_dropped(_copies(keys, "image", rules.max_image_copies), "image_copies"))
    table = pa.concat_tables([DROPPED.empty_table(), *found])
    places = [table[name].to_numpy() for name in ("part", "row", "segment")]
    order = np.lexsort(places[::-1])  # stable: the first reason of a place comes first
    new = np.ones(len(order), dtype=bool)
    ordered = np.stack([column[order] for column in places], axis=1)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return table.take(pa.array(order[new]))


def _dropped(rows: pa.Table, reason: str) -> pa.Table:
    reasons = pa.array([reason] * rows.num_rows, pa.string())
    return pa.table([rows["part"], rows["row"], rows["segment"], reasons, rows["key"]], schema=DROPPED)


def _copies(keys: pa.Table, kind: str, most: int) -> pa.Table:
    """Where every key of this kind stands after its first `most` documents, in the order of parts, rows and segments."""
    keys = keys.filter(pc.equal(keys["kind"].cast(pa.string()), kind))
    if not keys.num_rows:
        return keys
    halves = np.frombuffer(b"".join(keys["key"].to_pylist()), dtype=">u8").reshape(-1, 2)
    places = [keys[name].to_numpy() for name in ("segment", "row", "part")]
    order = np.lexsort([*places, halves[:, 1], halves[:, 0]])
    new_key, new_row = np.ones((2, len(order)), dtype=bool)
    new_key[1:] = (halves[order][1:] != halves[order][:-1]).any(axis=1)
    rows = np.stack([places[2][order], places[1][order]], axis=1)
    new_row[1:] = (rows[1:] != rows[:-1]).any(axis=1)
    document = np.cumsum(new_key | new_row)
    first = np.maximum.accumulate(np.where(new_key, document, 0))
    return keys.take(pa.array(np.sort(order[document - first >= most])))
