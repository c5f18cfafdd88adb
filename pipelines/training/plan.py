"""Plans: which rows a rank reads at which global step, as lists of addresses.

Every epoch is a permutation of all rows; epochs are laid end to end and cut into global steps, so that nothing is dropped at
the end of an epoch. A plan is a pure function of (seed, sizes, costs): a stream may start at any step, and where it starts,
how many ranks read it and which of them died before never changes what a step holds.
"""

import bisect
from functools import lru_cache

import numpy as np

from moca_core.rng import generator

# Measured with benchmarks/packing.py's documents, one row a rank and step, on the packs that differ most (2,048 tokens, cost varies
# by 27 %): the slowest rank takes 1.057 of the mean with buckets of 8 steps, 1.022 with 32, 1.006 with 128. More steps would mean
# that a small corpus is one bucket, sorted; on packs of `pack_evenly` 8 are enough.
BUCKET_STEPS = 32
# Up to so many ranks (and for numbers that divide it) a micro-batch is neighbours in cost. No more than that: all rows of a group
# are of one kind, so a step is mixed by having several.
GROUP_ROWS = 64


def hold_out(
    num_rows: int, fraction: float, rows_per_step: int, key: tuple[int | str, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """(rows to train on, rows held out for validation), both sorted: whole steps of about `fraction` of the rows, drawn by `key`."""
    count = round(num_rows * fraction / rows_per_step) * rows_per_step
    drawn = generator(*key, "validation").permutation(num_rows)
    return np.sort(drawn[count:]), np.sort(drawn[:count])


def row_plan(costs: np.ndarray, rows_per_step: int, steps: range, rank: int, world_size: int, seed: int) -> list[dict]:
    """This rank's addresses for these global steps: [{"step", "epoch", "row"}], its micro-batches one after the other.

    `costs` [num_rows] float64 is the work in every row, in any unit. All ranks get about the same work in a step, and in every
    micro-batch of it (under ZeRO-3 they wait for each other at every layer), even with one row a rank: the steps of a bucket
    trade rows (`_mix`), then the ranks of a step share them (`_deal`). All ranks have equally many micro-batches: where
    `rows_per_step` is not a multiple of `world_size`, the row of the last is None on ranks that have none left.
    """
    assert rows_per_step >= world_size, f"{rows_per_step} rows a step for {world_size} ranks"
    plan: list[dict] = []
    step = steps.start
    while step < steps.stop:
        bucket = _bucket_of(step, rows_per_step, len(costs))
        epochs, rows = _mix(bucket, rows_per_step, costs, seed)
        mine = _deal(costs[rows], world_size)[:, :, rank]
        while step in bucket and step in steps:
            place = step - bucket.start
            for slot in mine[place]:
                empty = slot >= rows_per_step
                row = None if empty else int(rows[place, slot])
                plan.append({"step": step, "epoch": 0 if empty else int(epochs[place, slot]), "row": row})
            step += 1
    return plan


def _bucket_of(step: int, rows_per_step: int, num_rows: int) -> range:
    """The steps that trade rows with this one: at most `BUCKET_STEPS`, of about equal number in all buckets of an epoch.

    All are of one epoch, as neighbours in cost of two epochs are often the same row twice. A step in which epochs meet is alone.
    """
    epoch = step * rows_per_step // num_rows
    first, stop = -(-epoch * num_rows // rows_per_step), (epoch + 1) * num_rows // rows_per_step
    if step >= stop:
        return range(step, step + 1)
    buckets = -(-(stop - first) // BUCKET_STEPS)
    bucket = ((step - first + 1) * buckets - 1) // (stop - first)
    return range(first + (stop - first) * bucket // buckets, first + (stop - first) * (bucket + 1) // buckets)


def _mix(bucket: range, rows_per_step: int, costs: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(epochs, rows), each [steps of the bucket, rows_per_step], from a step's most expensive row to its cheapest.

    Sorted by cost, the bucket is cut into as many ranges as a step has groups, a range into one group of neighbours for every
    step, dealt at random: a step gets rows of all costs, in groups of nearly equal cost.
    """
    positions = np.arange(bucket.start * rows_per_step, bucket.stop * rows_per_step)
    epochs, rows = _rows_at(positions, len(costs), seed)
    by_cost = np.argsort(-costs[rows], kind="stable")  # equal costs stay in the order of the permutation
    deal, parts = generator(seed, bucket.start, "deal"), []
    for first in range(0, rows_per_step, GROUP_ROWS):
        size = min(GROUP_ROWS, rows_per_step - first)
        groups = by_cost[first * len(bucket) : (first + size) * len(bucket)].reshape(len(bucket), size)
        parts.append(groups[deal.permutation(len(bucket))])
    places = np.concatenate(parts, axis=1)
    return epochs[places], rows[places]


def _deal(costs: np.ndarray, world_size: int) -> np.ndarray:
    """Which row of its step every rank reads: [steps, micro-batches, world_size], for `costs` [steps, rows] sorted within steps.

    A micro-batch takes neighbours in cost; the rank with the least work so far gets the most expensive of them. Places behind
    the last row, in the last micro-batch of ranks with the most work, are of no row.
    """
    steps, rows = costs.shape
    micro_batches = -(-rows // world_size)
    costs = np.pad(costs, ((0, 0), (0, micro_batches * world_size - rows)))
    places = np.empty((steps, micro_batches, world_size), dtype=np.int64)
    work = np.zeros((steps, world_size))
    for slot, first in enumerate(range(0, micro_batches * world_size, world_size)):
        ranks = np.argsort(work, axis=1, kind="stable")
        np.put_along_axis(places[:, slot], ranks, np.arange(first, first + world_size)[None], axis=1)
        work += np.take_along_axis(costs, places[:, slot], axis=1)
    return places


def _rows_at(positions: np.ndarray, num_rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(epochs, rows) at places of the endless sequence of permutations of `num_rows`."""
    epochs, offsets = np.divmod(positions, num_rows)
    rows = np.empty_like(positions)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        rows[here] = _permutation(num_rows, epoch, (seed,))[offsets[here]]
    return epochs, rows


@lru_cache(maxsize=64)
def _permutation(num_rows: int, epoch: int, key: tuple) -> np.ndarray:
    return generator(*key, epoch, "order").permutation(num_rows)


def pair_plan(
    sizes: dict[str, int],
    weights: dict[str, float],
    batch_size: int,
    steps: range,
    rank: int,
    world_size: int,
    seed: int,
    *,
    task_batches: bool = True,
) -> list[dict]:
    """This rank's share of contrastive batches: [{"step", "pairs": [(source, row)]}], a contiguous part of every batch.

    With `task_batches` a step draws one source by weight, and all its pairs are of that one; without, every pair draws its own.
    A source gives its pairs in its own order (`_Order`). Steps before the first are drawn again, without addresses.
    """
    assert batch_size >= world_size, f"{batch_size} pairs a step for {world_size} ranks"
    names = sorted(sizes)
    chances = np.array([weights[name] for name in names])
    draws, chances = generator(seed, "sources"), chances / chances.sum()
    orders = [_Order(sizes[name], (seed, name)) for name in names]
    mine = share_of(batch_size, rank, world_size)
    plan = []
    for step in range(steps.stop):
        drawn = draws.choice(len(names), size=1 if task_batches else batch_size, p=chances)
        sources, rows = np.broadcast_to(drawn, batch_size), np.empty(batch_size, dtype=np.int64)
        for source in np.unique(drawn):
            here = sources == source
            rows[here] = orders[source].take(np.count_nonzero(here))
        if step in steps:
            pairs = zip(sources[mine].tolist(), rows[mine].tolist(), strict=True)
            plan.append({"step": step, "pairs": [(names[source], row) for source, row in pairs]})
    return plan


def validation_plan(held_out: dict[str, np.ndarray], batch_size: int, rank: int, world_size: int) -> list[dict]:
    """This rank's share of the batches of held-out pairs, every one of one task, as in `pair_plan`."""
    batches = [
        [(name, int(row)) for row in rows[first : first + batch_size]]
        for name, rows in sorted(held_out.items())
        for first in range(0, len(rows), batch_size)
    ]
    mine = share_of(batch_size, rank, world_size)
    return [{"step": number, "pairs": batch[mine]} for number, batch in enumerate(batches)]


def share_of(count: int, rank: int, world_size: int) -> slice:
    """The contiguous part of `count` items that a rank has; parts differ by one item at most."""
    return slice(rank * count // world_size, (rank + 1) * count // world_size)


class _Order:
    """All rows of a source in one permutation after the other, taken batch by batch.

    A batch in which one epoch ends and the next begins would hold some rows twice. The next epoch gives its other rows first, and
    those when the batch is done: only a batch of more rows than there are repeats any.
    """

    def __init__(self, num_rows: int, key: tuple[str | int, ...]) -> None:
        self.num_rows, self.key = num_rows, key
        self.epoch, self.left = -1, np.empty(0, dtype=np.int64)  # rows of the epoch that were not taken yet

    def take(self, count: int) -> np.ndarray:
        """The next `count` rows, as one batch."""
        taken = []
        while count > len(self.left):
            last, count = self.left, count - len(self.left)
            taken.append(last)
            self.epoch += 1
            following = _permutation(self.num_rows, self.epoch, self.key)
            first = following[~np.isin(following, last)][:count]
            self.left = np.concatenate([first, following[~np.isin(following, first)]])
        taken.append(self.left[:count])
        self.left = self.left[count:]
        return np.concatenate(taken)


def locate(row: int, rows_per_file: list[int]) -> tuple[int, int]:
    """(file, row in it) of a row counted over all files."""
    ends = np.cumsum(rows_per_file).tolist()
    file = bisect.bisect_right(ends, row)
    return file, row - (ends[file - 1] if file else 0)
