"""Metrics against their definitions: expectations over ties, and scikit-learn's nDCG."""

from itertools import permutations

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from moca_core.metrics import chance_at_1, ndcg, precision_at_1


def expected_over_orders(scores, value):
    """The mean of `value(order)` over all orders that sort the scores."""
    orders = [o for o in permutations(range(len(scores))) if all(np.diff(scores[list(o)]) <= 0)]
    return np.mean([value(o) for o in orders])


@pytest.mark.parametrize("seed", range(12))
def test_both_are_expectations_over_orders_of_ties(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 3, 6).astype(float)
    positives = rng.choice(6, rng.integers(1, 5), replace=False).tolist()

    def gain(order, k):
        ideal = sum(1 / np.log2(i + 2) for i in range(min(k, len(positives))))
        return sum(1 / np.log2(i + 2) for i, c in enumerate(order[:k]) if c in positives) / ideal

    assert precision_at_1(scores, positives) == pytest.approx(
        expected_over_orders(scores, lambda order: order[0] in positives)
    )
    for k in (1, 3, 6, 20):
        assert ndcg(scores, positives, k) == pytest.approx(expected_over_orders(scores, lambda o, k=k: gain(o, k)))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("k", [1, 5, 10])
def test_ndcg_is_that_of_scikit_learn(ties, k):
    rng = np.random.default_rng(k)
    for _ in range(30):
        scores = rng.integers(0, 8, 40).astype(float) if ties else rng.normal(size=40)
        positives = rng.choice(40, rng.integers(1, 12), replace=False)
        truth = np.zeros(40)
        truth[positives] = 1
        assert ndcg(scores, positives.tolist(), k) == pytest.approx(ndcg_score([truth], [scores], k=k))


def test_closed_forms():
    scores = np.array([0.1, 0.9, 0.5])
    assert [precision_at_1(scores, [i]) for i in range(3)] == [0, 1, 0]
    assert ndcg(scores, [1], 5) == 1
    assert ndcg(scores, [2], 5) == pytest.approx(1 / np.log2(3))
    assert ndcg(scores, [0], 5) == pytest.approx(1 / 2)
    assert ndcg(scores, [0], 2) == 0
    assert precision_at_1(np.array([1.0, 1, 0]), [0, 2]) == 0.5


def test_collapsed_embeddings_score_chance():
    scores = np.full(61, 0.7, dtype=np.float32)
    assert precision_at_1(scores, [3]) == pytest.approx(chance_at_1(61, 1)) == pytest.approx(1 / 61)
    assert precision_at_1(scores, [3, 9]) == pytest.approx(chance_at_1(61, 2))
    everywhere = [ndcg(scores, [i], 5) for i in range(61)]
    assert everywhere == pytest.approx([sum(1 / np.log2(i + 2) for i in range(5)) / 61] * 61)


@pytest.mark.parametrize("count", [7, 61, 100])
def test_collapsed_embeddings_score_chance_through_a_real_product(count):
    """BLAS sums the rows of one product in different orders: equal vectors, scores that differ in the last bit."""
    rng = np.random.default_rng(0)
    unequal = 0
    for _ in range(40):
        vector, query = rng.normal(size=(2, 256)).astype(np.float32)
        vector, query = vector / np.linalg.norm(vector), query / np.linalg.norm(query)
        scores = np.tile(vector, (count, 1)) @ query
        scores[:3] += np.float32(6e-8)  # where this machine's BLAS is exact
        unequal += len(set(scores.tolist())) > 1
        for place in (0, count - 1):
            assert precision_at_1(scores, [place]) == pytest.approx(1 / count)
            assert ndcg(scores, [place], 5) == pytest.approx(sum(1 / np.log2(i + 2) for i in range(5)) / count)
    assert unequal


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_cannot_be_ranked_are_refused(bad):
    scores = np.array([0.3, bad, 0.1])
    for metric in (lambda: precision_at_1(scores, [0]), lambda: ndcg(scores, [0], 5)):
        with pytest.raises(ValueError, match="NaN or infinity"):
            metric()
