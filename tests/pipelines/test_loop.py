"""The training loop against closed forms: how rows fall on micro-batches never changes a step."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from cluster.engine import EngineConfig
from cluster.torch_engine import TorchEngine
from moca_core.loss import LossTerm
from pipelines.training.config import TrainingConfig
from pipelines.training.guard import WINDOW_STEPS, Guard
from pipelines.training.loop import evaluate, train


@dataclass
class Stream:
    input_ids: np.ndarray


@dataclass
class Batch:
    stream: Stream
    x: torch.Tensor

    @property
    def rows(self) -> int:
        return len(self.x)

    @property
    def content(self) -> int:
        return int(self.x.nan_to_num().sum())


def batch(*values: float) -> Batch:
    return Batch(Stream(np.zeros(len(values))), torch.tensor(values))


class Square(torch.nn.Module):
    """Sum over values of (w * x - 1)^2, and their number: uneven batches must still give the mean over all values."""

    def __init__(self, start: float = 0.5) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([[start]]))
        self.weights = {"square": 1.0, "seen": 0.0}

    def counts(self, batch):
        return {"square": len(batch.x), "seen": len(batch.x)}

    def flops(self, batch):
        return 1e6 * len(batch.x)

    def forward(self, batch):
        square = (self.w[0, 0] * batch.x - 1).square().sum()
        seen = LossTerm(batch.x.sum(), len(batch.x))
        values = LossTerm(torch.tensor([len(batch.x), batch.x.sum()], dtype=torch.float64), 1)
        return {"square": LossTerm(square, len(batch.x)), "seen": seen, "values": values}


def run(steps: list[list[Batch]], start: float = 0.5, peak=None, **settings):
    config = TrainingConfig(
        steps=len(steps), learning_rate=0.1, decay="none", warmup_fraction=0, max_grad_norm=0, **settings
    )
    objective = Square(start)
    engine = TorchEngine(objective, EngineConfig())
    reports = []
    train(
        engine,
        objective,
        enumerate(steps),
        config,
        sum_over_ranks=lambda tensor: tensor,
        after_step=reports.append,
        peak_flops_per_s=peak,
    )
    return objective.w.item(), reports


def test_a_split_into_uneven_micro_batches_changes_nothing():
    whole, one = run([[batch(1, 2, 3, 4)]] * 5)
    split, two = run([[batch(1), batch(2, 3, 4)]] * 5)
    assert split == pytest.approx(whole, abs=1e-6)
    assert [r.metrics["total"] for r in two] == pytest.approx([r.metrics["total"] for r in one], abs=1e-6)
    assert [r.content for r in two] == [r.content for r in one] == [10] * 5
    assert all((r.observed["values"] == [4, 10]).all() for r in (*one, *two))


def test_work_is_counted_over_all_micro_batches_and_measured_by_the_peak():
    row = run([[batch(1), batch(2, 3)]], peak=1e9)[1][0].metrics
    assert row["tflops_per_s"] / row["tokens_per_s"] == pytest.approx(1e6 / 1e12)  # this objective's FLOPs of a token
    assert row["mfu"] == pytest.approx(row["tflops_per_s"] * 1e12 / 1e9)
    assert "mfu" not in run([[batch(1)]])[1][0].metrics


def test_losses_are_means_over_all_elements_and_weights_enter_the_total_only():
    row = run([[batch(1), batch(2, 3)]])[1][0].metrics
    assert row["square"] == pytest.approx(((0.5 - 1) ** 2 + 0 + 0.5**2) / 3)
    assert row["seen"] == pytest.approx(2.0) and row["total"] == pytest.approx(row["square"])
    assert row["tokens"] == 3 and 0 <= row["data_wait"] <= 1
    expected = sum(2 * (0.5 * x - 1) * x for x in (1, 2, 3)) / 3
    assert row["grad_norm"] == pytest.approx(abs(expected), rel=1e-5)


def test_what_is_not_finite_is_found_among_the_micro_batches():
    start, reports = run([[batch(1.0), batch(2.0)], [batch(1.0), batch(float("nan")), batch(2.0)]])
    assert [report.bad_micro_batches for report in reports] == [[], [1]]
    assert not np.isfinite(reports[1].metrics["total"]) and np.isfinite(start)  # the weights stayed


def test_evaluation_has_the_means_of_a_step_and_trains_nothing():
    objective = Square(0.5)
    engine = TorchEngine(objective, EngineConfig())
    stream = enumerate([[batch(1), batch(2, 3)], [batch(4)]])
    losses, observed = evaluate(engine, objective, stream, lambda tensor: tensor)
    assert losses["square"] == pytest.approx(sum((0.5 * x - 1) ** 2 for x in (1, 2, 3, 4)) / 4)
    assert losses["total"] == losses["square"] and observed["values"].tolist() == [4, 10]
    assert objective.w.grad is None


def test_a_loss_that_rises_and_stays_up_ends_the_run_and_a_spike_does_not():
    guard = Guard(abort_above=2.0)
    falling = [4.0 * 0.99**step for step in range(3 * WINDOW_STEPS)]
    assert all(guard.judge(loss, 1.0) is None for loss in falling)
    assert guard.judge(150.0, 1.0) is None, "one step"
    guard = Guard(abort_above=2.0, state=json.loads(json.dumps(guard.state)))  # as a checkpoint brings it back
    verdicts = [guard.judge(9.0, 1.0) for _ in range(WINDOW_STEPS)]
    assert verdicts[10] is None and "diverges" in verdicts[-1]
    assert Guard(abort_above=0, state=guard.state).judge(9.0, 1.0) is None
    for loss, norm in ((float("nan"), 1.0), (1.0, float("inf"))):
        assert "gradient norm" in Guard(abort_above=0).judge(loss, norm)


def test_learning_rate_warms_up_and_decays():
    config = TrainingConfig(steps=100, learning_rate=1.0, warmup_fraction=0.1, decay="linear")
    rates = [config.learning_rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == 1.0 and rates.index(1.0) == 9
    assert rates[-1] == pytest.approx(1 / 90) and rates[55] == pytest.approx(0.5)
    cosine = TrainingConfig(steps=100, learning_rate=1.0, warmup_fraction=0, decay="cosine")
    assert cosine.learning_rate_at(50) == pytest.approx(0.5)
