"""Pairs to a contrastive batch: queries and candidates as one packed stream."""

import hashlib

import numpy as np

from moca_core.data.masking import packed_stream
from moca_core.data.render import Renderer
from moca_core.data.rows import packed_row, sequence_row
from moca_core.rng import generator
from moca_core.types import Content, Pair, PairBatch, content_id


def collate_pairs(
    pairs: list[Pair], renderer: Renderer, *, num_negatives: int, key: tuple[str | int, ...]
) -> PairBatch:
    """One rank's share of a batch. `key` and a pair's own query seed the choice among several right answers and spare negatives,
    so that how pairs fall on ranks never changes it.

    Sides longer than the renderer's budget are read up to the budget, at a paragraph or an image.
    """
    candidates: list[Content | None] = []
    groups: list[int] = []
    answered: list[int] = []
    for pair in pairs:
        query = content_id(pair.query)
        rng = generator(*key, query)
        positive = pair.positives[rng.integers(len(pair.positives))]
        chosen = rng.permutation(len(pair.negatives))[:num_negatives]
        negatives: list[Content | None] = [pair.negatives[i] for i in chosen]
        negatives += [None] * (num_negatives - len(negatives))
        candidates += [positive, *negatives]
        groups += [_answer(candidate, pair) for candidate in (positive, *negatives)]
        answered += [_number(query), *[0] * num_negatives]
    sequences = [renderer.first(pair.query) for pair in pairs]
    sequences += [renderer.first(candidate) for candidate in candidates if candidate is not None]
    return PairBatch(
        stream=packed_stream(
            packed_row([sequence_row("", s) for s in sequences], renderer.spec), renderer.spec, fast=True
        ),
        num_queries=len(pairs),
        candidate_valid=np.array([candidate is not None for candidate in candidates]),
        candidate_group=np.array(groups, dtype=np.int64),
        candidate_query=np.array(answered, dtype=np.int64),
    )


def _answer(candidate: Content | None, pair: Pair) -> int:
    """The answer that a candidate is: the pair's group for any of its right answers, also one listed as wrong by mistake."""
    if candidate is None:
        return 0
    if pair.group is not None and candidate in pair.positives:
        return _number(pair.group)
    return _number(content_id(candidate))


def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
