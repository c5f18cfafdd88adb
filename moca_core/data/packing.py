"""Packing: sequences of uneven length into rows of one token budget."""

from bisect import bisect_left, insort

import numpy as np

EVEN_FILL = 0.975  # of the budget: how full packs of equal cost stay
TRIES = 5  # numbers of packs that are tried for them


def pack(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices of sequences per pack, every pack at most `budget` tokens: best fit, longest first.

    Each sequence goes to the fullest open pack that still holds it. Deterministic; O(n log n) but for list insertion.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, pack), sorted
    for index in order:
        length = lengths[index]
        assert 0 < length <= budget, f"sequence {index} has {length} tokens, the budget is {budget}"
        slot = bisect_left(room, (length, -1))
        if slot == len(room):
            packs.append([index])
            free, target = budget, len(packs) - 1
        else:
            free, target = room.pop(slot)
            packs[target].append(index)
        if free - length:
            insort(room, (free - length, target))
    return [sorted(members) for members in packs]


def pack_evenly(lengths: list[int], costs: list[float], budget: int) -> list[list[int]]:
    """Like `pack`, with packs that also cost about the same: best fit puts images with images, and text with text.

    `costs` (any unit) are those of the sequences, and add up to the cost of a pack. As many packs as best fit takes, or a few more
    while they stay `EVEN_FILL` full; where sequences do not spread over those (a small window, or long sequences), it is best fit.
    O(n * packs).
    """
    fullest = pack(lengths, budget)
    most = max(len(fullest), int(sum(lengths) / (EVEN_FILL * budget)))
    counts = np.unique(np.linspace(len(fullest), most, TRIES, dtype=int))
    tries = (_spread(lengths, costs, budget, count) for count in counts)
    return next((packs for packs in tries if packs is not None), fullest)


def _spread(lengths: list[int], costs: list[float], budget: int, count: int) -> list[list[int]] | None:
    """Sequences dealt to exactly `count` packs, longest first; None where one fits nowhere.

    What costs more per token than the average (images) goes to the cheapest pack that holds it, the rest to the emptiest, so
    that both images and tokens are spread.
    """
    rate = sum(costs) / max(1, sum(lengths))
    free, cost = np.full(count, budget), np.zeros(count)
    packs: list[list[int]] = [[] for _ in range(count)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        emptiest = int(free.argmax())
        if free[emptiest] < length:
            return None
        dense = costs[index] > rate * length
        target = int(np.where(free >= length, cost, np.inf).argmin()) if dense else emptiest
        packs[target].append(index)
        free[target] -= length
        cost[target] += costs[index]
    return [sorted(members) for members in packs]
