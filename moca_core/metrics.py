"""Retrieval metrics with honest ties: equal scores share a rank, so a collapsed model scores what chance gives it."""

from collections.abc import Sequence

import numpy as np

TIE = 1e-6  # float32 cosines of equal vectors differ by less: a matrix product rounds its rows differently


def precision_at_1(scores: np.ndarray, positives: Sequence[int]) -> float:
    """Probability that the top candidate is right, ties broken at random. scores: [candidates]; positives: right positions.

    Raises ValueError for scores that are not finite: they cannot be ranked.
    """
    if not np.isfinite(scores).all():
        raise ValueError("scores hold NaN or infinity: the embeddings are broken")
    top = scores >= scores.max() - TIE
    return float(top[list(positives)].sum() / top.sum())


def chance_at_1(num_candidates: int, num_positives: int) -> float:
    return num_positives / num_candidates


def ndcg(scores: np.ndarray, positives: Sequence[int], k: int) -> float:
    """Binary nDCG@k, in expectation over random orders of equal scores."""
    if not np.isfinite(scores).all():
        raise ValueError("scores hold NaN or infinity: the embeddings are broken")
    discount = np.zeros(len(scores))
    depth = min(k, len(scores))
    discount[:depth] = 1 / np.log2(np.arange(2, depth + 2))
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    starts = np.flatnonzero(np.r_[True, ordered[:-1] - ordered[1:] > TIE])
    sizes = np.diff(np.r_[starts, len(scores)])
    expected = np.empty(len(scores))
    expected[order] = np.repeat(np.add.reduceat(discount, starts) / sizes, sizes)
    return float(expected[list(positives)].sum() / discount[: min(len(positives), depth)].sum())
