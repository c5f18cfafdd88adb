"""Metrics against their definitions: expectations over ties, closed forms, and pytrec_eval."""

from itertools import permutations

import numpy as np
import pytest
import pytrec_eval

from moca_core.metrics import best, ranking


def expected_over_orders(scores, value):
    """The mean of `value(order)` over all orders that sort the scores."""
    orders = [o for o in permutations(range(len(scores))) if all(np.diff(scores[list(o)]) <= 0)]
    return np.mean([value(o) for o in orders])


@pytest.mark.parametrize("seed", range(12))
def test_all_are_expectations_over_orders_of_ties(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 3, 6).astype(float)
    positives = rng.choice(6, rng.integers(1, 5), replace=False).tolist()
    grades = rng.integers(1, 4, len(positives)).tolist()
    graded = dict(zip(positives, grades, strict=True))

    def gain(order, k):
        ideal = sum(g / np.log2(i + 2) for i, g in enumerate(sorted(grades, reverse=True)[:k]))
        return sum(graded.get(c, 0) / np.log2(i + 2) for i, c in enumerate(order[:k])) / ideal

    found = ranking(scores, positives)
    assert found.precision_at_1() == pytest.approx(expected_over_orders(scores, lambda order: order[0] in positives))
    first = expected_over_orders(scores, lambda order: 1 + min(order.index(p) for p in positives))
    assert found.right_rank() == pytest.approx(first)
    for k in (1, 3, 6, 20):
        assert found.ndcg(k, grades) == pytest.approx(expected_over_orders(scores, lambda o, k=k: gain(o, k)))
        hits = expected_over_orders(scores, lambda o, k=k: sum(c in positives for c in o[:k]))
        assert found.recall(k) == pytest.approx(hits / len(positives))


def judged_by_trec(scores, graded, measures):
    """pytrec_eval on one query; the names of the candidates are such that it does not have to break ties."""
    assert len(np.unique(scores)) == len(scores)
    run = {"q": {f"d{i}": float(score) for i, score in enumerate(scores)}}
    qrels = {"q": {f"d{i}": grade for i, grade in graded.items()}}
    return pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(run)["q"]


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_pytrec_eval_finds_the_same(seed, graded):
    rng = np.random.default_rng(seed)
    scores = rng.permutation(np.linspace(-1, 1, 60))
    positives = rng.choice(60, rng.integers(1, 25), replace=False).tolist()
    grades = rng.integers(1, 4, len(positives)).tolist() if graded else None
    found = ranking(scores, positives)
    depths = (1, 3, 5, 10, 20, 100)
    measures = {f"{name}.{','.join(map(str, depths))}" for name in ("ndcg_cut", "recall")} | {"recip_rank", "P.1"}
    trec = judged_by_trec(scores, dict(zip(positives, grades or [1] * len(positives), strict=True)), measures)
    for k in depths:
        assert found.ndcg(k, grades) == pytest.approx(trec[f"ndcg_cut_{k}"], abs=1e-9)
        assert found.recall(k) == pytest.approx(trec[f"recall_{k}"], abs=1e-9)
    assert found.precision_at_1() == trec["P_1"]
    assert 1 / found.right_rank() == pytest.approx(trec["recip_rank"], abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_mteb_s_retrieval_evaluation_finds_the_same_on_random_embeddings(seed):
    from mteb._evaluators.retrieval_metrics import calculate_retrieval_scores

    rng = np.random.default_rng(seed)
    queries, candidates = rng.normal(size=(25, 8)), rng.normal(size=(40, 8))
    scores = queries @ candidates.T / np.linalg.norm(candidates, axis=1)
    judged = [dict(zip(rng.choice(40, 4, replace=False).tolist(), (1, 1, 2, 3), strict=True)) for _ in queries]
    results = {f"q{n}": {f"d{i}": float(s) for i, s in enumerate(row)} for n, row in enumerate(scores)}
    qrels = {f"q{n}": {f"d{i}": grade for i, grade in graded.items()} for n, graded in enumerate(judged)}
    theirs = calculate_retrieval_scores(results, qrels, (1, 5, 10)).all_scores
    for n, (row, graded) in enumerate(zip(scores, judged, strict=True)):
        found = ranking(row, list(graded))
        for k in (1, 5, 10):
            assert found.ndcg(k, list(graded.values())) == pytest.approx(theirs[f"q{n}"][f"ndcg_cut_{k}"], abs=1e-9)
            assert found.recall(k) == pytest.approx(theirs[f"q{n}"][f"recall_{k}"], abs=1e-9)


def test_closed_forms():
    scores = np.array([0.1, 0.9, 0.5])
    assert [ranking(scores, [i]).precision_at_1() for i in range(3)] == [0, 1, 0]
    assert [ranking(scores, [i]).right_rank() for i in range(3)] == [3, 1, 2]
    assert ranking(scores, [1]).ndcg(5) == 1
    assert ranking(scores, [2]).ndcg(5) == pytest.approx(1 / np.log2(3))
    assert ranking(scores, [0]).ndcg(5) == pytest.approx(1 / 2)
    assert ranking(scores, [0]).ndcg(2) == 0
    assert [ranking(scores, [0, 1]).recall(k) for k in (1, 2, 3)] == [0.5, 0.5, 1]
    assert ranking(np.array([1.0, 1, 0]), [0, 2]).precision_at_1() == 0.5
    # linear gains of 3 and 1 in the wrong order
    assert ranking(scores, [2, 1]).ndcg(5, [3, 1]) == pytest.approx((1 + 3 / np.log2(3)) / (3 + 1 / np.log2(3)))


def test_collapsed_embeddings_score_chance():
    scores = np.full(61, 0.7, dtype=np.float32)
    one, two = ranking(scores, [3]), ranking(scores, [3, 9])
    assert one.precision_at_1() == pytest.approx(1 / 61)
    assert two.precision_at_1() == pytest.approx(2 / 61)
    assert one.recall(5) == pytest.approx(5 / 61) and two.recall(5) == pytest.approx(5 / 61)
    assert one.right_rank() == 31 and two.right_rank() == pytest.approx(62 / 3)
    everywhere = [ranking(scores, [i]).ndcg(5) for i in range(61)]
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
            found = ranking(scores, [place])
            assert found.precision_at_1() == pytest.approx(1 / count)
            assert found.ndcg(5) == pytest.approx(sum(1 / np.log2(i + 2) for i in range(5)) / count)
    assert unequal


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_cannot_be_ranked_are_refused(bad):
    with pytest.raises(ValueError, match="NaN or infinity"):
        ranking(np.array([0.3, bad, 0.1]), [0])


@pytest.mark.parametrize("seed", range(5))
def test_the_best_are_those_of_a_stable_sort(seed):
    scores = np.random.default_rng(seed).integers(0, 6, 30).astype(np.float32)
    for k in (1, 7, 30, 50):
        assert best(scores, k).tolist() == np.argsort(-scores, kind="stable")[:k].tolist()
