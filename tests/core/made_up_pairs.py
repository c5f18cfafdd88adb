"""Contrastive batches without contents: vectors near each other, equal queries, equal answers, on any number of ranks."""

from dataclasses import dataclass

import numpy as np
import torch

from moca_core.types import PairBatch
from tests.stock import Asked, Offered

TASKS = ("a", "b", "c")
SHARES = {1: [10], 2: [7, 3], 4: [3, 1, 4, 2]}  # queries of every rank


@dataclass(frozen=True)
class Scene:
    """A whole batch. `vectors` [10 + C, D]: of the queries, then of the candidates."""

    names: np.ndarray
    source: np.ndarray
    owner: np.ndarray
    right: np.ndarray
    group: np.ndarray
    content: np.ndarray
    vectors: torch.Tensor

    @property
    def num_queries(self):
        return len(self.names)

    def members(self, rank, world):
        """Positions of this rank's queries, and of its candidates."""
        last = np.cumsum(SHARES[world])[rank]
        first = last - SHARES[world][rank]
        return np.arange(first, last), np.flatnonzero((self.owner >= first) & (self.owner < last))

    def vectors_of(self, rank, world):
        queries, candidates = self.members(rank, world)
        return self.vectors[np.concatenate([queries, self.num_queries + candidates])]

    def batch(self, rank=0, world=1):
        """This rank's share. The loss never looks at the stream."""
        queries, candidates = self.members(rank, world)
        owner, right = self.owner[candidates], self.right[candidates]
        return PairBatch(
            stream=None,
            num_queries=len(queries),
            candidate_owner=owner - queries[0],
            candidate_positive=right,
            candidate_group=self.group[candidates],
            candidate_content=self.content[candidates],
            candidate_query=np.where(right, 1000 + self.names[owner], 0),
            source=self.source[queries],
        )

    def told(self, vectors, log_temperatures):
        """The same for tests/stock.py, with these vectors [10 + C, D] and logarithms of the temperatures of TASKS."""
        queries, candidates = vectors[: self.num_queries], vectors[self.num_queries :]
        temperatures = log_temperatures.exp()[torch.from_numpy(self.source)]
        asked = [Asked(*one) for one in zip(self.names.tolist(), temperatures, queries, strict=True)]
        listed = (column.tolist() for column in (self.owner, self.right, self.group, self.content))
        return asked, [Offered(*one) for one in zip(*listed, candidates, strict=True)]


def scene(width, seed=0):
    """Ten queries with one to three right answers and none to three wrong ones each; many repeat something."""
    rng = np.random.default_rng(seed)
    names = rng.integers(8, size=10)
    owner, right = [], []
    for query in range(10):
        kinds = [True] * rng.integers(1, 4) + [False] * rng.integers(0, 4)
        owner += [query] * len(kinds)
        right += kinds
    owner, right = np.array(owner), np.array(right)
    centre = rng.normal(size=width)
    vectors = centre + 1.5 * rng.normal(size=(10 + len(owner), width))
    vectors[10:][right] += 0.4 * vectors[:10][owner[right]]
    content = rng.integers(30, size=len(owner))
    source = rng.integers(len(TASKS), size=10)
    named = rng.integers(-4, 4, size=10)[owner]  # the group of a query's right answers, where it has one
    group = np.where(right & (named >= 0), 100 + named, content)
    return Scene(names, source, owner, right, group, content, torch.from_numpy(vectors).float())
