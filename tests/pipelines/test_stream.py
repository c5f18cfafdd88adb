"""The plan of a stream: exact, whatever the number of ranks and wherever it starts."""

from collections import Counter

import pytest

from pipelines.training.stream import locate, pair_plan, row_plan


def steps_of(plans: list[list[dict]]) -> dict[int, list[tuple[int, int]]]:
    """{step: all ranks' (epoch, row)} in the order of ranks."""
    merged: dict[int, list] = {}
    for plan in plans:
        for address in plan:
            merged.setdefault(address["step"], []).append((address["epoch"], address["row"]))
    return merged


def test_every_epoch_holds_every_row_once_in_a_new_order():
    plan = row_plan(num_rows=7, rows_per_step=2, steps=range(7), rank=0, world_size=1, seed=1)  # two epochs, 7 is odd
    epochs = {e: [a["row"] for a in plan if a["epoch"] == e] for e in (0, 1)}
    assert all(sorted(rows) == list(range(7)) for rows in epochs.values())
    assert epochs[0] != epochs[1] and len(plan) == 14


def test_steps_do_not_depend_on_the_number_of_ranks_or_on_where_a_stream_starts():
    whole = steps_of([row_plan(11, 4, range(20), 0, 1, seed=3)])
    for world in (2, 4):
        assert steps_of([row_plan(11, 4, range(20), rank, world, seed=3) for rank in range(world)]) == whole
    late = steps_of([row_plan(11, 4, range(13, 20), rank, 2, seed=3) for rank in range(2)])
    assert late == {step: rows for step, rows in whole.items() if step >= 13}
    assert steps_of([row_plan(11, 4, range(20), 0, 1, seed=4)]) != whole


def pairs(steps, rank=0, world=1, sizes=None, weights=None):
    sizes = sizes or {"a": 10, "b": 100}
    return pair_plan(sizes, weights or {"a": 1.0, "b": 3.0}, 4, steps, rank, world, seed=5)


def test_a_batch_is_one_task_and_tasks_come_by_weight():
    plan = pairs(range(400))
    counts = Counter(address["source"] for address in plan)
    assert 60 < counts["a"] < 140 and counts["a"] + counts["b"] == 400  # 100 expected, 5 standard deviations are 43
    assert all(len(set(a["rows"])) <= 4 and max(a["rows"]) < {"a": 10, "b": 100}[a["source"]] for a in plan)


def test_a_task_gives_every_pair_once_before_any_twice():
    rows = [row for address in pairs(range(400)) if address["source"] == "b" for row in address["rows"]]
    assert sorted(rows[:100]) == list(range(100)) and rows[100:200] != rows[:100]


def test_pair_batches_do_not_depend_on_the_number_of_ranks_or_the_start():
    whole = [address["rows"] for address in pairs(range(50))]
    ranks = [pairs(range(50), rank, 2) for rank in (0, 1)]
    assert [a["rows"] + b["rows"] for a, b in zip(*ranks, strict=True)] == whole
    assert [address["rows"] for address in pairs(range(30, 50))] == whole[30:]


@pytest.mark.parametrize(("row", "place"), [(0, (0, 0)), (2, (0, 2)), (3, (2, 0)), (6, (2, 3))])
def test_rows_are_found_across_files(row, place):
    assert locate(row, [3, 0, 4]) == place
