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
    """One rank's share of a batch. `key` seeds the choice among several right answers and among spare negatives.

    Sides longer than the renderer's budget are read up to the budget, at a paragraph or an image.
    """
    candidates: list[Content | None] = []
    groups: list[int] = []
    for number, pair in enumerate(pairs):
        rng = generator(*key, number)
        positive = pair.positives[rng.integers(len(pair.positives))]
        chosen = rng.permutation(len(pair.negatives))[:num_negatives]
        negatives: list[Content | None] = [pair.negatives[i] for i in chosen]
        negatives += [None] * (num_negatives - len(negatives))
        candidates += [positive, *negatives]
        groups.append(_group(pair.group or content_id(positive)))
        groups += [_group(content_id(n)) if n is not None else 0 for n in negatives]
    sequences = [renderer.first(pair.query) for pair in pairs]
    sequences += [renderer.first(candidate) for candidate in candidates if candidate is not None]
    return PairBatch(
        stream=packed_stream(packed_row([sequence_row("", s) for s in sequences], renderer.spec), renderer.spec),
        num_queries=len(pairs),
        candidate_valid=np.array([candidate is not None for candidate in candidates]),
        candidate_group=np.array(groups, dtype=np.int64),
    )


def _group(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)

