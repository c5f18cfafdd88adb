"""Retrieval metrics with honest ties: equal scores share a rank, so a collapsed model scores what chance gives it.

Every metric is an expectation over random orders of equal scores, and depends on nothing but where the right answers stand: `ranking`
finds that out by one sort of a query's scores, whatever is asked of it afterwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TIE = 1e-6  # float32 cosines of equal vectors differ by less: a matrix product rounds its rows differently


@dataclass(frozen=True)
class Ranking:
    """Where the right answers of one query stand among `candidates`: of each, how many come `before` it and how many are `tied`
    with it, itself among them. Both [R], in the order of the right answers."""

    candidates: int
    before: np.ndarray
    tied: np.ndarray

    def precision_at_1(self) -> float:
        """Probability that the first candidate is right."""
        return float((1 / self.tied[self.before == 0]).sum())

    def recall(self, k: int) -> float:
        """Share of the right answers among the first k."""
        return float(np.clip((k - self.before) / self.tied, 0, 1).mean())

    def ndcg(self, k: int, grades: Sequence[float] | None = None) -> float:
        """nDCG@k with linear gains, as TREC's evaluation has it. grades: how right each answer is; None: all the same."""
        gains = np.ones(len(self.before)) if grades is None else np.asarray(grades, dtype=float)
        gained = np.r_[
            0, np.cumsum(1 / np.log2(np.arange(2, min(k, self.candidates) + 2)))
        ]  # [depth + 1], of gains of 1
        depth = len(gained) - 1
        first, last = np.minimum(self.before, depth), np.minimum(self.before + self.tied, depth)
        expected = gains * (gained[last] - gained[first]) / self.tied
        ideal = np.sort(gains)[::-1][:depth] * np.diff(gained)[: len(gains)]
        return float(expected.sum() / ideal.sum())

    def right_rank(self) -> float:
        """Expected rank, from 1, of the best right answer."""
        best = self.before.min()
        among, tied = (self.before == best).sum(), self.tied[self.before.argmin()]
        return float(best + (tied + 1) / (among + 1))


def ranking(scores: np.ndarray, positives: Sequence[int]) -> Ranking:
    """scores: [candidates]; positives: positions of the right answers, each once, at least one.

    Scores are equal where no gap above `TIE` lies between them. Raises ValueError for scores that are not finite: they cannot be ranked.
    """
    if not np.isfinite(scores).all():
        raise ValueError("scores hold NaN or infinity: the embeddings are broken")
    falling = np.sort(-scores)  # so that the best come first
    starts = np.flatnonzero(
        np.r_[True, np.diff(falling) > TIE, True]
    )  # of the groups of equal scores, and the end of the last
    group = np.searchsorted(falling[starts[:-1]], -scores[list(positives)], side="right") - 1
    return Ranking(len(scores), starts[group], starts[group + 1] - starts[group])


def best(scores: np.ndarray, k: int) -> np.ndarray:
    """Positions of the k highest scores, or of all there are: best first, equal ones in order of position."""
    k = min(k, len(scores))
    last = np.partition(scores, len(scores) - k)[len(scores) - k]
    near = np.flatnonzero(scores >= last)
    return near[np.argsort(-scores[near], kind="stable")][:k]
