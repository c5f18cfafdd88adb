"""Plans: which rows a rank reads at which global step, as lists of addresses.

Every epoch is a permutation of all rows; epochs are laid end to end and cut into global steps, so that nothing is dropped at
the end of an epoch. A plan is a pure function of (seed, sizes, costs): a stream may start at any step at once, and where it
starts, how many ranks read it and which of them died before never changes what a step holds.
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


def row_plan(costs: np.ndarray, rows_per_step: int, steps: range, rank: int, world_size: int, seed: int) -> list[dict]:
    """This rank's addresses for these global steps: [{"step", "epoch", "row"}], its micro-batches one after the other.

    `costs` [num_rows] float64 is the work in every row, in any unit. All ranks get about the same work in a step, and in every
    micro-batch of it (under ZeRO-3 they wait for each other at every layer), even with one row a rank: the steps of a bucket
    trade rows (`_mix`), then the ranks of a step share them (`_deal`). `rows_per_step` is a multiple of `world_size`.
    """
    assert rows_per_step % world_size == 0, f"{rows_per_step} rows a step do not fall evenly on {world_size} ranks"
    plan: list[dict] = []
    step = steps.start
    while step < steps.stop:
        bucket = _bucket_of(step, rows_per_step, len(costs))
        epochs, rows = _mix(bucket, rows_per_step, costs, seed)
        mine = _deal(costs[rows], world_size)[:, :, rank]
        while step in bucket and step in steps:
            place = step - bucket.start
            for slot in mine[place]:
                plan.append({"step": step, "epoch": int(epochs[place, slot]), "row": int(rows[place, slot])})
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

    A micro-batch takes neighbours in cost; the rank with the least work so far gets the most expensive of them.
    """
    steps, rows = costs.shape
    places = np.empty((steps, rows // world_size, world_size), dtype=np.int64)
    work = np.zeros((steps, world_size))
    for slot, first in enumerate(range(0, rows, world_size)):
        ranks = np.argsort(work, axis=1, kind="stable")
        np.put_along_axis(places[:, slot], ranks, np.arange(first, first + world_size)[None], axis=1)
        work += np.take_along_axis(costs, places[:, slot], axis=1)
    return places


def _rows_at(positions: np.ndarray, num_rows: int, *key: str | int) -> tuple[np.ndarray, np.ndarray]:
    """(epochs, rows) at places of the endless sequence of permutations of `num_rows`."""
    epochs, offsets = np.divmod(positions, num_rows)
    rows = np.empty_like(positions)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        rows[here] = _permutation(num_rows, epoch, key)[offsets[here]]
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
) -> list[dict]:
    """This rank's share of task-homogeneous batches: [{"step", "source", "rows"}].

    Every global step draws one source by weight, and takes that source's next `batch_size` pairs.
    """
    names = sorted(sizes)
    chances = np.array([weights[name] for name in names])
    draws = generator(seed, "sources").choice(len(names), size=steps.stop, p=chances / chances.sum())
    share = batch_size // world_size
    taken = np.bincount(draws[: steps.start], minlength=len(names))
    plan = []
    for step in steps:
        draw = draws[step]
        first = taken[draw] * batch_size + rank * share
        taken[draw] += 1
        _, rows = _rows_at(np.arange(first, first + share), sizes[names[draw]], seed, names[draw])
        plan.append({"step": step, "source": names[draw], "rows": rows.tolist()})
    return plan


def locate(row: int, rows_per_file: list[int]) -> tuple[int, int]:
    """(file, row in it) of a row counted over all files."""
    ends = np.cumsum(rows_per_file).tolist()
    file = bisect.bisect_right(ends, row)
    return file, row - (ends[file - 1] if file else 0)
