"""Pairs to a contrastive batch: queries and candidates as one packed stream."""

from collections.abc import Sequence

import numpy as np

from moca_core.data.answers import number
from moca_core.data.masking import packed_stream
from moca_core.data.render import Renderer
from moca_core.data.rows import packed_row, sequence_row
from moca_core.rng import generator
from moca_core.types import Content, Pair, PairBatch, content_id


def collate_pairs(
    pairs: list[Pair],
    renderer: Renderer,
    *,
    num_negatives: int,
    num_positives: int = 1,
    sources: Sequence[str],
    key: tuple[str | int, ...],
) -> PairBatch:
    """One rank's share of a batch: of every pair at most `num_positives` right and `num_negatives` wrong answers.

    Which ones is drawn from `key` and the pair's own query, so that how pairs fall on ranks never changes it. `sources` are the sorted
    names of all tasks. Sides longer than the renderer's budget are read up to the budget, at a paragraph or an image.
    """
    candidates: list[Content] = []
    owners, positive, groups, contents, answered = [], [], [], [], []
    for owner, pair in enumerate(pairs):
        query = content_id(pair.query)
        rng = generator(*key, query)
        right = [pair.positives[i] for i in rng.permutation(len(pair.positives))[:num_positives]]
        wrong = [pair.negatives[i] for i in rng.permutation(len(pair.negatives))[:num_negatives]]
        chosen = right + wrong
        candidates += chosen
        owners += [owner] * len(chosen)
        positive += [True] * len(right) + [False] * len(wrong)
        said = [number(content_id(candidate)) for candidate in chosen]
        contents += said
        groups += said if pair.group is None else _groups(chosen, said, pair)
        answered += [number(query)] * len(right) + [0] * len(wrong)
    sequences = [renderer.first(content) for content in [*(pair.query for pair in pairs), *candidates]]
    row = packed_row([sequence_row("", sequence) for sequence in sequences], renderer.spec)
    return PairBatch(
        stream=packed_stream(row, renderer.spec, fast=True),
        num_queries=len(pairs),
        candidate_owner=np.array(owners, dtype=np.int64),
        candidate_positive=np.array(positive, dtype=bool),
        candidate_group=np.array(groups, dtype=np.int64),
        candidate_content=np.array(contents, dtype=np.int64),
        candidate_query=np.array(answered, dtype=np.int64),
        source=np.array([sources.index(pair.source) for pair in pairs], dtype=np.int64),
    )


def _groups(chosen: list[Content], said: list[int], pair: Pair) -> list[int]:
    """The pair's group for any of its right answers, also one listed as wrong by mistake; what they say for the others."""
    group = number(pair.group)
    return [group if content in pair.positives else own for content, own in zip(chosen, said, strict=True)]
