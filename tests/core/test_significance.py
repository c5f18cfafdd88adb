"""Intervals and the paired test against scipy, closed forms, and what they promise: to be wrong as often as they say."""

import numpy as np
import pytest
import scipy.stats

from moca_core.significance import compare, holm, interval, over_runs


def test_the_interval_is_that_of_scipy():
    values = np.random.default_rng(0).random(400) ** 3
    ours = interval([values])
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert ours.mean == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=2e-3)
    assert ours == interval([values]) != interval([values], seed=1)


def test_of_several_tasks_each_counts_the_same():
    """A mean of means: its variance is the sum of theirs over the number of tasks squared."""
    rng = np.random.default_rng(0)
    tasks = [rng.normal(loc, 1, size) for loc, size in ((0, 50), (1, 500), (2, 5000))]
    ours = interval(tasks)
    assert ours.mean == pytest.approx(np.mean([task.mean() for task in tasks]))
    spread = np.sqrt(sum(task.var() / len(task) for task in tasks)) / 3
    assert (ours.high - ours.low) / 2 == pytest.approx(1.96 * spread, rel=0.05)


def test_an_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = [found.low <= 0.3 <= found.high for _ in range(200) for found in [interval([rng.random(80) < 0.3])]]
    assert 0.9 <= np.mean(held) <= 0.99


def test_few_queries_are_counted_in_full():
    # all differences alike: only all signs up, or all down, are as extreme
    assert compare([np.full(6, 0.7)], [np.full(6, 0.5)]).p_value == 2 / 2**6
    assert compare([np.ones(9)], [np.ones(9)]).p_value == 1
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 10))
    theirs = scipy.stats.permutation_test((a, b), lambda x, y: (x - y).mean(), permutation_type="samples")
    assert compare([a], [b]).p_value == pytest.approx(theirs.pvalue)


def test_many_queries_are_drawn():
    rng = np.random.default_rng(0)
    a = rng.random(300)
    b = a + rng.normal(0.02, 0.2, 300)
    ours = compare([a], [b])
    theirs = scipy.stats.permutation_test(
        (a, b), lambda x, y, axis: (x - y).mean(axis=axis), permutation_type="samples", vectorized=True, rng=rng
    )
    assert ours.p_value == pytest.approx(theirs.pvalue, abs=0.02)
    assert ours.difference.mean == pytest.approx((a - b).mean())
    assert ours.difference.low < ours.difference.mean < ours.difference.high
    assert compare([b], [a]).p_value == ours.p_value and compare([b], [a]).difference.mean == -ours.difference.mean
    assert compare([a], [a - 0.5]).p_value == 1 / 10_001


def test_several_tasks_are_one_question():
    """Small gains that no task could show alone; and none of them can be outweighed by its number of queries."""
    rng = np.random.default_rng(0)
    tasks = [(rng.normal(0.12, 1, n), np.zeros(n)) for n in (200, 200, 200, 200, 200, 200)]
    alone = [compare([a], [b]).p_value for a, b in tasks]
    together = compare([a for a, _ in tasks], [b for _, b in tasks])
    assert together.p_value < min(alone) and together.p_value < 0.01


def test_where_nothing_differs_a_difference_is_found_as_often_as_promised():
    rng = np.random.default_rng(0)
    found = [compare([rng.random(40)], [rng.random(40)]).p_value < 0.05 for _ in range(200)]
    assert 0.01 <= np.mean(found) <= 0.1


def test_the_interval_over_runs_is_students():
    values = [0.61, 0.58, 0.64]
    theirs = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    ours = over_runs(values)
    assert (ours.mean, ours.low, ours.high) == pytest.approx((0.61, theirs.low, theirs.high))


def test_p_values_of_a_family_are_adjusted_as_holm_says():
    """The k-th smallest of n times n - k + 1, never below that of a smaller one, never above 1."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([0.2]) == [0.2] and holm([]) == []
