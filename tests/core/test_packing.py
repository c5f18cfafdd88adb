"""Packing: everything once, never above the budget, nearly full, always the same."""

import numpy as np
import pytest

from moca_core.data.packing import pack

BUDGET = 2048


def realistic(kind, count=4000):
    rng = np.random.default_rng(3)
    lengths = {
        "lognormal": np.exp(rng.normal(5.5, 1.1, count)),
        "pieces of long documents": np.where(
            rng.random(count) < 0.3, BUDGET - rng.integers(0, 200, count), rng.integers(5, 600, count)
        ),
        "image sizes": rng.choice([66, 102, 258, 514], count) + rng.integers(0, 80, count),
    }[kind]
    return np.clip(lengths, 1, BUDGET).astype(int).tolist()


@pytest.mark.parametrize("kind", ["lognormal", "pieces of long documents", "image sizes"])
def test_packs_are_full_and_complete(kind):
    lengths = realistic(kind)
    packs = pack(lengths, BUDGET)
    assert sorted(i for members in packs for i in members) == list(range(len(lengths)))
    totals = [sum(lengths[i] for i in members) for members in packs]
    assert max(totals) <= BUDGET
    assert sum(totals) / (len(packs) * BUDGET) >= 0.97
    assert packs == pack(list(lengths), BUDGET)


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_decreasing(seed):
    """Against the plain quadratic form: the fullest open pack that still holds the next longest."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 51, rng.integers(0, 60)).tolist()
    bins = []
    for length in sorted(lengths, reverse=True):
        fitting = [b for b in bins if sum(b) + length <= 50]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            bins.append([length])
    packs = pack(lengths, 50)
    assert sorted(sum(lengths[i] for i in members) for members in packs) == sorted(map(sum, bins))


def test_edges():
    assert pack([], 10) == []
    assert pack([10, 10], 10) == [[0], [1]]
    assert pack([5, 6, 5, 4], 10) == [[1, 3], [0, 2]]
    for bad in ([11], [0]):
        with pytest.raises(AssertionError, match="budget"):
            pack(bad, 10)
