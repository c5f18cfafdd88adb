"""Which contents answer which queries of a task: what a search for wrong answers must not bring back."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from moca_core.types import Pair, content_id

PAIR_KEYS = pa.schema(  # a row for every pair: its contents and its group by number
    [
        ("query", pa.int64()),
        ("group", pa.int64()),
        ("positives", pa.list_(pa.int64())),
        ("negatives", pa.list_(pa.int64())),
    ]
)

REASONS = ("own_positive", "equal_query", "same_group", "query_itself")


def number(name: str) -> int:
    """64 bits of a hash: two of ten million names are the same number with a chance of 3 in a million."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)


def pair_keys(pairs: Iterable[Pair]) -> pa.Table:
    rows = [
        {
            "query": number(content_id(pair.query)),
            "group": None if pair.group is None else number(f"group {pair.group}"),
            "positives": [number(content_id(content)) for content in pair.positives],
            "negatives": [number(content_id(content)) for content in pair.negatives],
        }
        for pair in pairs
    ]
    return pa.Table.from_pylist(rows, schema=PAIR_KEYS)


@dataclass(frozen=True)
class Relation:
    """Which numbers `right` [N] belong to which `left` [N], sorted by both, each pair once."""

    left: np.ndarray
    right: np.ndarray

    @staticmethod
    def of(left: np.ndarray, right: np.ndarray) -> "Relation":
        order = np.lexsort((right, left))
        left, right = left[order], right[order]
        fresh = np.ones(len(left), dtype=bool)
        fresh[1:] = (left[1:] != left[:-1]) | (right[1:] != right[:-1])
        return Relation(left[fresh], right[fresh])

    def after(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(places, rights): all that belongs to `wanted[place]`, place by place."""
        first = np.searchsorted(self.left, wanted, "left")
        counts = np.searchsorted(self.left, wanted, "right") - first
        return np.repeat(np.arange(len(wanted)), counts), self.right[np.repeat(first, counts) + _count_up(counts)]


@dataclass(frozen=True)
class Barred:
    """Entries that a query must not get as wrong answers: `rows` [F] counts the queries asked for, `reasons` [F] index REASONS."""

    rows: np.ndarray
    entries: np.ndarray
    reasons: np.ndarray


class Answers:
    """All distinct contents that a task's pairs name as right or wrong answers, numbered by where they come up first.

    Entry e is the answer `place[e]` of pair `pair[e]`, its positives counted before its negatives. Holds some 100 bytes for every
    answer that a pair names.
    """

    def __init__(self, keys: pa.Table) -> None:
        """`keys`: the rows of PAIR_KEYS of all pairs of the task, in order."""
        columns = {name: keys[name].combine_chunks() for name in keys.column_names}
        self.query = columns["query"].to_numpy()
        rights, wrongs = (columns[name].value_lengths().to_numpy() for name in ("positives", "negatives"))
        numbers = np.concatenate([columns[name].flatten().to_numpy() for name in ("positives", "negatives")])
        pair = np.concatenate([np.repeat(np.arange(len(counts)), counts) for counts in (rights, wrongs)])
        place = np.concatenate([_count_up(rights), _count_up(wrongs) + np.repeat(rights, wrongs)])
        order = np.lexsort((place, pair))
        numbers, pair, place = numbers[order], pair[order], place[order]

        distinct, first, inverse = np.unique(numbers, return_index=True, return_inverse=True)
        by_appearance = np.argsort(first)
        rank = np.empty_like(by_appearance)
        rank[by_appearance] = np.arange(len(distinct))
        self.pair, self.place = pair[first[by_appearance]], place[first[by_appearance]]

        right = place < rights[pair]
        entry, answered = rank[inverse][right], pair[right]
        own_group = columns["group"].is_null().to_numpy(zero_copy_only=False)[answered]
        named = columns["group"].fill_null(0).to_numpy()[answered]
        group = np.where(own_group, numbers[right], named)
        self._positives = Relation.of(answered, entry)
        self._asked = Relation.of(self.query[answered], entry)
        self._groups = Relation.of(self.query[answered], group)
        self._members = Relation.of(group, entry)
        self._same = Relation.of(distinct, rank)

    def __len__(self) -> int:
        return len(self.pair)

    def first_named_by(self, pairs: range) -> slice:
        """The entries that come up first in these pairs."""
        return slice(*np.searchsorted(self.pair, [pairs.start, pairs.stop]).tolist())

    def barred(self, pairs: range) -> Barred:
        """What the queries of these pairs must not get: their own right answers and those of an equal query, all members of the
        groups of those, and the query's own content."""
        asked = self.query[pairs.start : pairs.stop]
        askers, groups = self._groups.after(asked)
        places, members = self._members.after(groups)
        found = (
            self._positives.after(np.arange(pairs.start, pairs.stop)),
            self._asked.after(asked),
            (askers[places], members),
            self._same.after(asked),
        )
        rows, entries = (np.concatenate(column) for column in zip(*found, strict=True))
        reasons = np.repeat(np.arange(len(found)), [len(column[0]) for column in found])
        _, first = np.unique(rows * len(self) + entries, return_index=True)  # of several reasons the first counts
        return Barred(rows[first], entries[first], reasons[first])


def _count_up(counts: np.ndarray) -> np.ndarray:
    """0, 1, ... for every count, one after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
