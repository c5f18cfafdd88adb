"""The one training loop: batches, engine, losses by their parts, checkpoints. It knows no stage and no cluster."""

import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch

from cluster.engine import Engine
from moca_core.loss import LossTerm
from pipelines.training.config import TrainingConfig


class Objective(Protocol):
    """What is trained: a batch to loss terms, whose counts and FLOPs are known before the forward pass."""

    weights: dict[str, float]

    def counts(self, batch: Any) -> dict[str, int]: ...

    def flops(self, batch: Any) -> float: ...

    def __call__(self, batch: Any) -> dict[str, LossTerm]: ...


def train(
    engine: Engine,
    objective: Objective,
    stream: Iterable[tuple[int, list[Any]]],
    config: TrainingConfig,
    *,
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor],
    report: Callable[[int, dict[str, float]], None],
    checkpoint: Callable[[int], None],
    peak_flops_per_s: float | None = None,
) -> None:
    """Trains over the stream. `report(step, metrics)` and `checkpoint(steps done)` are called after every step.

    `peak_flops_per_s` of one worker's device gives the metric "mfu", the share of it that the step's FLOPs came to, waiting included.

    Every loss term is divided by its count over all ranks and micro-batches of the step, so that how rows fall on ranks never
    changes a gradient.
    """
    names = list(objective.weights)
    batches_of = iter(stream)
    clock = time.perf_counter()
    while (item := next(batches_of, None)) is not None:
        step, batches = item
        data_wait_s = time.perf_counter() - clock
        local = torch.tensor(
            [[float(objective.counts(batch)[name]) for name in names] for batch in batches], dtype=torch.float64
        )
        work = [sum(len(batch.stream.input_ids) for batch in batches), sum(map(objective.flops, batches))]
        summed = torch.cat([local.sum(0), torch.tensor(work, dtype=torch.float64)]).to(engine.device)
        *counted, tokens, flops = sum_over_ranks(summed).tolist()
        counts = dict(zip(names, counted, strict=True))
        sums = torch.zeros(len(names), dtype=torch.float64, device=engine.device)
        for number, batch in enumerate(batches, start=1):
            terms = engine.forward(batch)
            loss = sum(objective.weights[n] * terms[n].sum / max(1.0, counts[n]) for n in names if objective.weights[n])
            engine.backward(loss, last=number == len(batches))
            sums += torch.stack([terms[name].sum.detach().double() for name in names])
        learning_rate = config.learning_rate_at(step)
        grad_norm = engine.step(learning_rate)
        means = {
            name: value / max(1.0, counts[name])
            for name, value in zip(names, sum_over_ranks(sums).tolist(), strict=True)
        }
        total = sum(weight * means[name] for name, weight in objective.weights.items())
        if not torch.isfinite(torch.tensor([total, grad_norm])).all():
            raise FloatingPointError(f"step {step}: loss {total}, gradient norm {grad_norm}; losses by part {means}")
        elapsed = time.perf_counter() - clock
        report(
            step,
            means
            | {
                "total": total,
                "learning_rate": learning_rate,
                "grad_norm": grad_norm,
                "tokens": tokens,
                "tokens_per_s": tokens / elapsed,
                "tflops_per_s": flops / elapsed / engine.world_size / 1e12,
                "data_wait": data_wait_s / elapsed,
            }
            | ({"mfu": flops / elapsed / engine.world_size / peak_flops_per_s} if peak_flops_per_s else {}),
        )
        checkpoint(step + 1)
        clock = time.perf_counter()
