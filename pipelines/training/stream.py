"""The stream in front of training: a plan of addresses, and Ray Data over the rest of it.

The order of rows is a permutation per epoch, laid end to end and cut into global steps, so that nothing is dropped at the end
of an epoch. A plan is a pure function of (seed, sizes): a stream may start at any step at once, and where it starts, how many
ranks read it and which of them died before never changes what a step holds.
"""

import bisect
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np

from moca_core.data.codec import from_bytes
from moca_core.rng import generator
from moca_core.types import MaskedBatch, PairBatch

ADDRESSES_PER_TASK = 4  # batches that one Ray Data task makes: small enough to start at once


def row_at(position: int, num_rows: int, *key: str | int) -> tuple[int, int]:
    """(epoch, row) at a place of the endless sequence of permutations of `num_rows`."""
    epoch, offset = divmod(position, num_rows)
    return epoch, int(_permutation(num_rows, epoch, key)[offset])


@lru_cache(maxsize=64)
def _permutation(num_rows: int, epoch: int, key: tuple) -> np.ndarray:
    return generator(*key, epoch, "order").permutation(num_rows)


def row_plan(num_rows: int, rows_per_step: int, steps: range, rank: int, world_size: int, seed: int) -> list[dict]:
    """This rank's addresses for these global steps: [{"step", "epoch", "row"}], its micro-batches one after the other."""
    share = rows_per_step // world_size
    plan = []
    for step in steps:
        for slot in range(rank * share, (rank + 1) * share):
            epoch, row = row_at(step * rows_per_step + slot, num_rows, seed)
            plan.append({"step": step, "epoch": epoch, "row": row})
    return plan


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
    taken = dict.fromkeys(names, 0)
    plan = []
    for step, draw in enumerate(draws):
        name = names[draw]
        first = taken[name] * batch_size + rank * share
        taken[name] += 1
        if step in steps:
            rows = [row_at(first + i, sizes[name], seed, name)[1] for i in range(share)]
            plan.append({"step": step, "source": name, "rows": rows})
    return plan


def open_stream(
    addresses: list[dict], make_batch: Callable[[dict], bytes], *, tasks: int
) -> Iterator[tuple[int, list[MaskedBatch | PairBatch]]]:
    """(global step, its micro-batches) in the order of `addresses`, made by Ray Data ahead of the training step,
    `tasks` at a time."""
    import ray.data
    from ray.data import TaskPoolStrategy

    if not addresses:
        return
    blocks = -(-len(addresses) // ADDRESSES_PER_TASK)
    items = [{"address": number} for number in range(len(addresses))]
    dataset = ray.data.from_items(items, override_num_blocks=blocks)
    dataset.context.execution_options.preserve_order = True
    dataset = dataset.map(_MakeRow(addresses, make_batch), num_cpus=0.25, compute=TaskPoolStrategy(size=tasks))
    step, batches = addresses[0]["step"], []
    for row in dataset.iter_rows():
        if row["step"] != step:
            yield step, batches
            step, batches = row["step"], []
        batches.append(from_bytes(row["batch"]))
    yield step, batches


class _MakeRow:
    """One address to one row. Addresses travel by number: their nested lists would come back from Arrow in other shapes."""

    def __init__(self, addresses: list[dict], make_batch: Callable[[dict], bytes]) -> None:
        self.addresses, self.make_batch = addresses, make_batch

    def __call__(self, item: dict) -> dict:
        address = self.addresses[item["address"]]
        return {"step": address["step"], "batch": self.make_batch(address)}


def locate(row: int, rows_per_file: list[int]) -> tuple[int, int]:
    """(file, row in it) of a row counted over all files."""
    ends = np.cumsum(rows_per_file).tolist()
    file = bisect.bisect_right(ends, row)
    return file, row - (ends[file - 1] if file else 0)
