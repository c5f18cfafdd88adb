"""The plan of a stream: exact, whatever the number of ranks and wherever it starts, and equal work for all ranks."""

import tracemalloc
from collections import Counter
from itertools import chain

import numpy as np
import pytest

from pipelines.training.plan import hold_out, locate, pair_plan, row_plan, validation_plan


def bimodal(count: int, seed: int = 0) -> np.ndarray:
    """Costs of packs that are all text or all images: two humps, 24 % of standard deviation over the mean."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(count) < 0.5, rng.normal(19, 0.5, count), rng.normal(31, 1.0, count))


def rows_of(costs, rows_per_step, steps, world=1, seed=3) -> np.ndarray:
    """[ranks, steps, micro-batches, (epoch, row)] of all ranks' plans."""
    plans = [row_plan(costs, rows_per_step, steps, rank, world, seed) for rank in range(world)]
    per_rank = rows_per_step // world
    assert all([a["step"] for a in plan] == [s for s in steps for _ in range(per_rank)] for plan in plans)
    return np.array([[(a["epoch"], a["row"]) for a in plan] for plan in plans]).reshape(world, len(steps), per_rank, 2)


def contents(costs, rows_per_step, steps, world=1, seed=3) -> list[list[tuple[int, int]]]:
    """The sorted (epoch, row) of every step."""
    rows = rows_of(costs, rows_per_step, steps, world, seed).transpose(1, 0, 2, 3).reshape(len(steps), -1, 2)
    return [sorted(map(tuple, step.tolist())) for step in rows]


@pytest.mark.parametrize(("num_rows", "rows_per_step"), [(7, 2), (8, 2), (3, 8), (1, 3), (500, 6), (601, 200)])
def test_every_epoch_holds_every_row_once(num_rows, rows_per_step):
    steps = range(-(-3 * num_rows // rows_per_step))
    order = [row for step in contents(bimodal(num_rows), rows_per_step, steps) for row in step]
    whole_epochs = len(order) // num_rows
    assert whole_epochs >= 2 and len(set(order)) == len(order)
    for epoch in range(whole_epochs):
        assert sorted(row for e, row in order if e == epoch) == list(range(num_rows))
    assert order == sorted(order, key=lambda a: a[0]), "an epoch ends before the next begins"


def test_epochs_and_seeds_are_in_different_orders():
    costs = bimodal(64)
    first, second = (
        [[r for _, r in step] for step in contents(costs, 4, steps)] for steps in (range(16), range(16, 32))
    )
    assert first != second
    assert contents(costs, 4, range(16), seed=3) == contents(costs, 4, range(16), seed=3)
    assert contents(costs, 4, range(16), seed=3) != contents(costs, 4, range(16), seed=4)
    early = [{row for step in contents(bimodal(1024), 4, range(64), seed=seed) for row in step} for seed in (3, 4)]
    assert early[0] != early[1], "the seed also says which rows come early"


@pytest.mark.parametrize("num_rows", [11, 1000])
def test_steps_do_not_depend_on_the_number_of_ranks_or_on_where_a_stream_starts(num_rows):
    costs, steps = bimodal(num_rows), range(120)
    whole = contents(costs, 8, steps)
    for world in (2, 4, 8):
        assert contents(costs, 8, steps, world) == whole
    for start in (1, 31, 32, 77, 119):
        assert contents(costs, 8, range(start, 120), world=2) == whole[start:]
        assert rows_of(costs, 8, range(start, 120), 2).tolist() == rows_of(costs, 8, steps, 2)[:, start:].tolist()
    assert contents(costs, 8, range(40, 50)) == whole[40:50]
    assert row_plan(costs, 8, range(5, 5), 0, 2, 3) == []


@pytest.mark.parametrize(("rows_per_step", "world"), [(8, 8), (32, 32), (64, 64), (32, 8), (96, 32), (128, 32)])
def test_ranks_get_equal_work_in_every_step_and_micro_batch(rows_per_step, world):
    costs = bimodal(128 * rows_per_step)
    work = costs[rows_of(costs, rows_per_step, range(128), world)[..., 1]]  # [ranks, steps, micro-batches]
    of_steps = work.sum(2).max(0) / work.sum(2).mean(0)
    of_micro_batches = work.max(0) / work.mean(0)
    assert of_steps.mean() < 1.02 and of_micro_batches.mean() < 1.02
    assert (of_steps > 1.05).mean() <= 0.05  # the step between the two humps, and the ends of the range


def test_several_micro_batches_make_up_for_each_other():
    """Where there are no neighbours to be had (a bucket of one step), the ranks' sums are still close."""
    costs = np.linspace(1.0, 2.0, 32)
    work = costs[rows_of(costs, 32, range(8), world=8)[..., 1]].sum(2)
    assert (work.max(0) / work.mean(0)).max() < 1.02


def test_steps_are_mixed():
    """The share of expensive rows in a step of 320 is about that of the corpus; sorted by cost it would be 0 or 1."""
    costs = bimodal(40_000)
    rows = rows_of(costs, 320, range(125))[..., 1].reshape(125, 320)
    share = (costs[rows] > 25).mean(1)
    assert share.std() < 0.1 and abs(share.mean() - 0.5) < 0.02
    assert np.sort(costs).reshape(125, 320)[:, 0].std() > 5  # what sorting everything would be


def test_cheap_and_expensive_steps_alternate():
    """Also where a step is rows of one kind, steps are in no order."""
    costs = bimodal(8 * 128)
    kind = costs[rows_of(costs, 8, range(128))[..., 1]].reshape(128, 8).mean(1) > 25
    assert 40 < (kind[1:] != kind[:-1]).sum() < 90  # 64 by chance; sorted within buckets of 32 steps it would be 7


def test_no_step_holds_a_row_twice_while_there_are_others():
    """Neighbours in cost are often one row of two epochs: they must not be sorted together."""
    steps = contents(bimodal(101), 2, range(500))
    assert sum(len({row for _, row in step}) < len(step) for step in steps) == 0


def test_equal_costs_are_a_plain_permutation():
    order = [row for step in contents(np.ones(50), 5, range(10)) for _, row in step]
    assert sorted(order) == list(range(50)) and order != sorted(order)
    assert contents(np.ones(50), 5, range(10), world=5) == contents(np.ones(50), 5, range(10))


def test_a_plan_far_into_training_is_made_at_once(monkeypatch):
    """O(1): a late start computes its own bucket and epoch, none before them."""
    from pipelines.training import plan

    made = []
    real = plan.generator
    monkeypatch.setattr(plan, "generator", lambda *key: made.append(key) or real(*key))
    row_plan(bimodal(10_000, seed=9), 8, range(1_000_000, 1_000_010), 0, 2, seed=99)
    assert len(made) <= 4  # one or two permutations, one or two deals


@pytest.mark.parametrize(("rows_per_step", "world"), [(8, 3), (5, 4), (7, 7), (64, 24)])
def test_rows_that_do_not_fall_evenly_leave_ranks_idle_in_the_last_micro_batch_alone(rows_per_step, world):
    costs = bimodal(1000)
    plans = [row_plan(costs, rows_per_step, range(40), rank, world, 3) for rank in range(world)]
    micro_batches = -(-rows_per_step // world)
    assert all(len(plan) == 40 * micro_batches for plan in plans)
    for step in range(40):
        mine = [[(a["epoch"], a["row"]) for a in plan if a["step"] == step] for plan in plans]
        assert all(row is not None for rows in mine for _, row in rows[:-1])
        assert sum(row is None for rows in mine for _, row in rows) == micro_batches * world - rows_per_step
        everything = sorted(address for rows in mine for address in rows if address[1] is not None)
        assert everything == contents(costs, rows_per_step, range(step, step + 1))[0], "as on one rank"
        work = [sum(costs[row] for _, row in rows if row is not None) for rows in mine]
        assert rows_per_step % world == 0 or min(work) > 0


@pytest.mark.parametrize("num_rows", [0, 3, 40, 1003])
def test_held_out_rows_are_whole_steps_and_never_trained_on(num_rows):
    kept, held_out = hold_out(num_rows, 0.1, 4, (7,))
    assert sorted([*kept, *held_out]) == list(range(num_rows)) and (np.diff(kept) > 0).all()
    assert len(held_out) % 4 == 0 and abs(len(held_out) - 0.1 * num_rows) <= 2
    assert len(hold_out(num_rows, 0, 4, (7,))[1]) == 0
    if num_rows == 1003:
        assert held_out.tolist() != hold_out(num_rows, 0.1, 4, (8,))[1].tolist()


def test_validation_batches_are_of_one_task_and_hold_every_pair_once_on_any_ranks():
    held_out = {"b": np.array([4, 9, 11]), "a": np.array([1, 2, 3, 5, 8, 13])}
    whole = [address["pairs"] for address in validation_plan(held_out, 3, 0, 1)]
    assert whole == [[("a", 1), ("a", 2), ("a", 3)], [("a", 5), ("a", 8), ("a", 13)], [("b", 4), ("b", 9), ("b", 11)]]
    for world in (2, 3):
        ranks = [validation_plan(held_out, 3, rank, world) for rank in range(world)]
        shares = zip(*([address["pairs"] for address in plan] for plan in ranks), strict=True)
        assert [[*chain(*parts)] for parts in shares] == whole and all(a["pairs"] for plan in ranks for a in plan)


SIZES = {"a": 10, "b": 100}
MODES = pytest.mark.parametrize("task_batches", [True, False])


def pairs(steps, rank=0, world=1, sizes=SIZES, batch_size=4, **mode) -> list[list[tuple[str, int]]]:
    """The pairs of every step; source b is drawn three times as often as any other."""
    weights = {name: 3.0 if name == "b" else 1.0 for name in sizes}
    plan = pair_plan(sizes, weights, batch_size, steps, rank, world, 5, **mode)
    assert [address["step"] for address in plan] == list(steps)
    return [address["pairs"] for address in plan]


def test_a_batch_is_one_task_and_tasks_come_by_weight():
    batches = pairs(range(400))
    assert all(len({source for source, _ in batch}) == 1 for batch in batches)
    counts = Counter(batch[0][0] for batch in batches)
    assert 60 < counts["a"] < 140 and counts["a"] + counts["b"] == 400  # 100 expected, 5 standard deviations are 43


def test_a_mixed_batch_draws_every_pair_by_weight():
    batches = pairs(range(400), task_batches=False)
    counts = Counter(source for batch in batches for source, _ in batch)
    assert 315 < counts["a"] < 485 and counts["a"] + counts["b"] == 1600  # 400 expected, 5 standard deviations are 87
    alike = Counter(len({source for source, _ in batch}) for batch in batches)
    assert 80 < alike[1] < 180 and alike[2] == 400 - alike[1]  # 4 draws alike: 0.75**4 + 0.25**4 = 0.32


@MODES
@pytest.mark.parametrize("source", SIZES)
def test_a_task_gives_every_pair_once_before_any_twice(task_batches, source):
    """But for those that a batch at the end of an epoch holds already: they stand behind it, still in the next epoch."""
    rows = [row for batch in pairs(range(400), task_batches=task_batches) for name, row in batch if name == source]
    size = SIZES[source]
    epochs = [rows[first : first + size] for first in range(0, len(rows) - size + 1, size)]
    assert len(epochs) >= 7 and all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


@MODES
@pytest.mark.parametrize(("sizes", "batch_size"), [({"a": 9, "b": 13}, 8), ({"a": 8, "b": 31}, 8), ({"a": 100}, 6)])
def test_no_batch_holds_a_pair_twice_while_the_task_has_others(sizes, batch_size, task_batches):
    """Also where epochs meet in every other batch."""
    batches = pairs(range(500), sizes=sizes, batch_size=batch_size, task_batches=task_batches)
    assert sum(len(set(batch)) < len(batch) for batch in batches) == 0


def test_a_task_smaller_than_its_share_repeats_its_pairs_about_equally_often():
    batches = pairs(range(50), sizes={"a": 3, "b": 60}, batch_size=24, task_batches=False)
    shares = [Counter(row for source, row in batch if source == "a") for batch in batches]
    assert max(share.total() for share in shares) > 6
    assert all(max(share.values()) <= -(-share.total() // 3) + 1 for share in shares if share)


@MODES
def test_pair_batches_do_not_depend_on_the_number_of_ranks_or_the_start(task_batches):
    """Ranks take contiguous shares."""
    whole = pairs(range(60), batch_size=8, task_batches=task_batches)
    for world in (2, 3, 4, 5, 8):
        ranks = [pairs(range(60), rank, world, batch_size=8, task_batches=task_batches) for rank in range(world)]
        assert [[*chain(*shares)] for shares in zip(*ranks, strict=True)] == whole
    for start in (1, 7, 30, 59):
        assert pairs(range(start, 60), 1, 2, batch_size=8, task_batches=task_batches) == [b[4:] for b in whole[start:]]
    assert pairs(range(40, 50), batch_size=8, task_batches=task_batches) == whole[40:50]
    assert pairs(range(5, 5), task_batches=task_batches) == []


@MODES
def test_a_stream_of_pairs_that_starts_late_makes_no_addresses_before(task_batches):
    """Two million pairs into training, in less memory than their addresses would take (100 bytes and more each)."""
    sizes = {f"task {number}": 50_000 for number in range(30)}
    tracemalloc.start()
    plan = pair_plan(sizes, dict.fromkeys(sizes, 1.0), 2048, range(970, 977), 3, 8, 0, task_batches=task_batches)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [len(address["pairs"]) for address in plan] == [256] * 7
    assert peak_bytes < 64 * 2**20


@pytest.mark.parametrize(("row", "place"), [(0, (0, 0)), (2, (0, 2)), (3, (2, 0)), (6, (2, 3))])
def test_rows_are_found_across_files(row, place):
    assert locate(row, [3, 0, 4]) == place
