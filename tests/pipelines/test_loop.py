"""The training loop against closed forms: how rows fall on micro-batches never changes a step."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from cluster.engine import EngineConfig
from cluster.torch_engine import TorchEngine
from moca_core.loss import LossTerm
from pipelines.training.config import TrainingConfig
from pipelines.training.loop import train


@dataclass
class Stream:
    input_ids: np.ndarray


@dataclass
class Batch:
    stream: Stream
    x: torch.Tensor


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
        return {"square": LossTerm(square, len(batch.x)), "seen": LossTerm(batch.x.sum(), len(batch.x))}


def run(steps: list[list[Batch]], start: float = 0.5, peak=None, **settings):
    config = TrainingConfig(
        steps=len(steps), learning_rate=0.1, decay="none", warmup_fraction=0, max_grad_norm=0, **settings
    )
    objective = Square(start)
    engine = TorchEngine(objective, EngineConfig())
    reports, checkpoints = [], []
    train(
        engine,
        objective,
        enumerate(steps),
        config,
        sum_over_ranks=lambda tensor: tensor,
        report=lambda step, metrics: reports.append(metrics),
        checkpoint=checkpoints.append,
        peak_flops_per_s=peak,
    )
    return objective.w.item(), reports, checkpoints


def test_a_split_into_uneven_micro_batches_changes_nothing():
    whole, one, _ = run([[batch(1, 2, 3, 4)]] * 5)
    split, two, _ = run([[batch(1), batch(2, 3, 4)]] * 5)
    assert split == pytest.approx(whole, abs=1e-6)
    assert [r["total"] for r in two] == pytest.approx([r["total"] for r in one], abs=1e-6)


def test_work_is_counted_over_all_micro_batches_and_measured_by_the_peak():
    _, (row,), _ = run([[batch(1), batch(2, 3)]], peak=1e9)
    assert row["tflops_per_s"] / row["tokens_per_s"] == pytest.approx(1e6 / 1e12)  # this objective's FLOPs of a token
    assert row["mfu"] == pytest.approx(row["tflops_per_s"] * 1e12 / 1e9)
    _, (row,), _ = run([[batch(1)]])
    assert "mfu" not in row


def test_losses_are_means_over_all_elements_and_weights_enter_the_total_only():
    _, (row,), done = run([[batch(1), batch(2, 3)]])
    assert row["square"] == pytest.approx(((0.5 - 1) ** 2 + 0 + 0.5**2) / 3)
    assert row["seen"] == pytest.approx(2.0) and row["total"] == pytest.approx(row["square"])
    assert row["tokens"] == 3 and 0 <= row["data_wait"] <= 1 and done == [1]
    expected = sum(2 * (0.5 * x - 1) * x for x in (1, 2, 3)) / 3
    assert row["grad_norm"] == pytest.approx(abs(expected), rel=1e-5)


def test_a_loss_that_is_not_finite_stops_training_and_says_where():
    with pytest.raises(FloatingPointError, match="step 1"):
        run([[batch(1.0)], [batch(float("nan"))]])


def test_learning_rate_warms_up_and_decays():
    config = TrainingConfig(steps=100, learning_rate=1.0, warmup_fraction=0.1, decay="linear")
    rates = [config.learning_rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == 1.0 and rates.index(1.0) == 9
    assert rates[-1] == pytest.approx(1 / 90) and rates[55] == pytest.approx(0.5)
    cosine = TrainingConfig(steps=100, learning_rate=1.0, warmup_fraction=0, decay="cosine")
    assert cosine.learning_rate_at(50) == pytest.approx(0.5)
