"""Where the seconds of a step go: all of them, each to one part."""

import time

import pytest
import torch

from cluster.communication import communicated_s, communicating
from cluster.engine import EngineConfig
from cluster.torch_engine import TorchEngine
from pipelines.pictures.time_spent import shares_of_time
from pipelines.training.config import TrainingConfig
from pipelines.training.loop import train
from pipelines.training.progress import Progress
from pipelines.training.stopwatch import PARTS, Stopwatch
from tests.pipelines.test_loop import Square, batch
from tests.ranks import on_ranks

STEPS = 6


class Slow(TorchEngine):
    """Every part of a step takes a time of its own."""

    def forward(self, given):
        time.sleep(0.02)
        return super().forward(given)

    def step(self, lr):
        time.sleep(0.01)
        return super().step(lr)


def slow_stream():
    for step in range(STEPS):
        time.sleep(0.03)
        yield step, [batch(1.0)]


def test_every_second_is_of_one_part_and_the_shares_sum_to_one() -> None:
    objective = Square()
    progress, rows = Progress("slow", STEPS, 4), []

    def after_step(report) -> None:
        rows.append(progress.add(report))
        time.sleep(0.04)

    config = TrainingConfig(steps=STEPS, learning_rate=0.1)
    engine = Slow(objective, EngineConfig())
    started = time.perf_counter()
    train(engine, objective, slow_stream(), config, sum_over_ranks=torch.clone, after_step=after_step)
    passed_s = time.perf_counter() - started
    rows = [row for row in rows if row]
    assert [row["step"] for row in rows] == [0, 3, 5]
    for row in rows:
        assert sum(row[f"time/{part}"] for part in PARTS) == pytest.approx(1)
    last = rows[-1]
    asleep_s = {"data": 0.03, "compute": 0.02, "optimizer": 0.01, "between": 0.04}
    for part, seconds in asleep_s.items():
        assert seconds <= last["step_s"] * last[f"time/{part}"], part
    whole_s = sum(row["step_s"] * count for row, count in zip(rows, (1, 3, 2), strict=True))
    assert whole_s == pytest.approx(passed_s - 0.04, abs=0.03), "all but what follows the last step"
    shares = shares_of_time(rows)
    assert list(shares) == list(PARTS) and sum(shares.values()) == pytest.approx(1)
    assert shares["data"] * whole_s >= STEPS * 0.03


def test_what_is_exchanged_during_the_passes_is_communication() -> None:
    exchanged = iter([0.0, 1.0, 1.0, 3.0, 3.5])  # seconds in collectives at every lap
    watch = Stopwatch(torch.device("cpu"), lambda: next(exchanged))
    for part in ("data", "communication", "compute", "optimizer"):
        watch.lap(part)
    seconds = dict(zip(PARTS, watch.read(), strict=True))
    assert seconds["compute"] == pytest.approx(-2, abs=0.1) and seconds["optimizer"] == pytest.approx(-0.5, abs=0.1)
    assert seconds["communication"] == pytest.approx(2.5, abs=0.1) and seconds["data"] < 0.1
    watch._communicated_s = lambda: 3.5
    watch.lap("between")
    assert sum(watch.read()) < 0.1, "read once"


def seconds_of_a_late_rank(stage: int) -> list[float]:
    """Seconds in collectives of rank 0, which waits for the other: in one of ours, and in those of a ZeRO step."""
    from cluster import collectives
    from cluster.engine import open_engine

    engine = open_engine(Square(), EngineConfig(zero_stage=stage))
    late = 0.3 * (engine.rank == 1)
    found = []
    for part in ("ours", "step"):
        torch.distributed.barrier()
        before = communicated_s()
        if part == "ours":
            time.sleep(late)
            collectives.all_reduce_sum(torch.ones(1))
        else:
            loss = engine.forward(batch(1.0))["square"].sum
            time.sleep(late)
            engine.backward(loss, last=True)
            engine.step(0.1)
        found.append(communicated_s() - before)
    return found


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_waiting_for_another_rank_counts_as_communication(stage: int) -> None:
    """The same in every engine, wherever in a step it exchanges."""
    ours, step = on_ranks(seconds_of_a_late_rank, 2, stage)
    assert ours > 0.25 and step > 0.25


def test_alone_nothing_is_exchanged() -> None:
    before = communicated_s()
    with communicating():
        time.sleep(0.01)
    assert communicated_s() == before
