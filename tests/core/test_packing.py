"""Packing: everything once, never above the budget, nearly full, of about equal cost, always the same."""

import numpy as np
import pytest

from moca_core.data.packing import pack, pack_evenly

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


def text_and_images(count, seed=0):
    """(lengths, costs) of texts and of captioned images, whose tokens cost 1.8 times as much."""
    rng = np.random.default_rng(seed)
    has_image = rng.random(count) < 0.5
    text = np.clip(rng.lognormal(np.where(has_image, 4.6, 6.4), 0.8), 10, 3000).astype(int)
    image = np.where(has_image, rng.integers(256, 1025, count), 0)
    return (text + image).tolist(), (18.8 * text + 34.1 * image).tolist()


def check(packs, lengths, budget):
    assert sorted(i for members in packs for i in members) == list(range(len(lengths)))
    assert all(members and sum(lengths[i] for i in members) <= budget for members in packs)


def fill(packs, lengths, budget):
    return sum(lengths) / (len(packs) * budget)


def varies(packs, costs):
    """Standard deviation over mean of the packs' costs."""
    of = [sum(costs[i] for i in members) for members in packs]
    return np.std(of) / np.mean(of)


@pytest.mark.parametrize("kind", ["lognormal", "pieces of long documents", "image sizes"])
def test_packs_are_full_and_complete(kind):
    lengths = realistic(kind)
    for packs in (pack(lengths, BUDGET), pack_evenly(lengths, [float(n) for n in lengths], BUDGET)):
        check(packs, lengths, BUDGET)
        assert fill(packs, lengths, BUDGET) >= 0.97
    assert pack(lengths, BUDGET) == pack(list(lengths), BUDGET)


@pytest.mark.parametrize("seed", range(5))
def test_a_window_of_a_realistic_mix_is_full_and_its_packs_cost_the_same(seed):
    lengths, costs = text_and_images(1024, seed)
    full, even = pack(lengths, 8192), pack_evenly(lengths, costs, 8192)
    check(even, lengths, 8192)
    assert even == pack_evenly(list(lengths), list(costs), 8192)
    assert fill(full, lengths, 8192) >= 0.98 and fill(even, lengths, 8192) >= 0.97
    assert varies(even, costs) < 0.03 and varies(full, costs) > 0.1


@pytest.mark.parametrize("seed", range(30))
def test_any_lengths_and_costs(seed):
    rng = np.random.default_rng(seed)
    budget, count = int(rng.integers(1, 60)), int(rng.integers(0, 200))
    lengths = rng.integers(1, budget + 1, count).tolist()
    costs = (rng.random(count) * lengths).tolist()
    full, even = pack(lengths, budget), pack_evenly(lengths, costs, budget)
    check(full, lengths, budget)
    check(even, lengths, budget)
    assert len(even) == len(full) or fill(even, lengths, budget) >= 0.975


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
    assert pack([], 10) == pack_evenly([], [], 10) == []
    assert pack([10, 10], 10) == pack_evenly([10, 10], [1.0, 2.0], 10) == [[0], [1]]
    assert pack([5, 6, 5, 4], 10) == [[1, 3], [0, 2]]
    for bad in ([11], [0]):
        for packed in (lambda lengths: pack(lengths, 10), lambda lengths: pack_evenly(lengths, [1.0], 10)):
            with pytest.raises(AssertionError, match="budget"):
                packed(bad)
