"""Packing: sequences of uneven length into rows of one token budget."""

from bisect import bisect_left, insort


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
