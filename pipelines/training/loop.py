"""The one training loop: batches, engine, losses by their parts. It knows no stage and no cluster."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from cluster.engine import Engine
from pipelines.training.backward import BackwardPass, Terms, whole_batches
from pipelines.training.config import TrainingConfig
from pipelines.training.stopwatch import PARTS, Stopwatch


class Objective(Protocol):
    """What is trained: a batch to loss terms, whose counts and FLOPs are known before the forward pass.

    Terms that `weights` names are scalars, each divided by its count over the whole step. Others are observations: sums of any
    shape, which the loop adds up and hands on.
    """

    weights: dict[str, float]

    def counts(self, batch: Any) -> dict[str, int]: ...

    def flops(self, batch: Any) -> float: ...

    def __call__(self, batch: Any) -> Terms: ...


@dataclass
class StepReport:
    """What a step gave, over all ranks. `metrics` are for people, `observed` what an objective observed on the way.

    `rows` sequences were trained on, and `content` is a number that they have in whatever order and on whichever ranks.
    `bad_micro_batches` are those of this rank whose own loss was not finite. `seconds` are those since the step before, by what they
    went to (`Stopwatch`), on average over ranks. `notice` says that some rank is about to be taken away.
    """

    step: int
    metrics: dict[str, float]
    observed: dict[str, np.ndarray]
    rows: int
    content: int
    notice: bool
    bad_micro_batches: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def train(
    engine: Engine,
    objective: Objective,
    stream: Iterable[tuple[int, list[Any]]],
    config: TrainingConfig,
    *,
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor],
    after_step: Callable[[StepReport], None],
    backward_pass: BackwardPass = whole_batches,
    notice: Callable[[], bool] = lambda: False,
    peak_flops_per_s: float | None = None,
    communicated_s: Callable[[], float] = lambda: 0.0,
) -> None:
    """Trains over the stream; `after_step` judges, logs and saves, on every rank.

    `peak_flops_per_s` of one worker's device gives the metric "mfu", the share of it that the step's FLOPs came to, waiting
    included. `notice` is asked once a step whether this rank is about to be taken away. `communicated_s` are this process's seconds
    in collectives.
    """
    batches_of = iter(stream)
    watch = Stopwatch(engine.device, communicated_s)
    clock = time.perf_counter()
    while (item := next(batches_of, None)) is not None:
        step, batches = item
        data_wait_s = time.perf_counter() - clock
        watch.lap("data")
        names = list(objective.weights)
        before = torch.cat([_counts(objective, batches), _work(objective, batches, notice())])
        summed = sum_over_ranks(before.to(engine.device)).tolist()
        counts = dict(zip(names, summed, strict=False))
        tokens, flops, rows, content, noticed = summed[len(names) :]
        watch.lap("communication")  # the wait for the last rank's batches
        passed = list(backward_pass(engine, objective, batches, partial(_loss, objective.weights, counts)))
        watch.lap("compute")
        learning_rate = config.learning_rate_at(step)
        grad_norm = engine.step(learning_rate)
        watch.lap("optimizer")
        sums = [torch.stack([terms[name].sum.double() for name in names]) for terms in passed]
        means = _means(names, sum_over_ranks(sum(sums)), counts)
        total = sum(weight * means[name] for name, weight in objective.weights.items())
        observed = _observations(passed, names, sum_over_ranks)
        watch.lap("communication")
        spent = sum_over_ranks(torch.tensor(watch.read(), dtype=torch.float64, device=engine.device))
        seconds = dict(zip(PARTS, (spent / engine.world_size).tolist(), strict=True))
        elapsed = time.perf_counter() - clock
        metrics = means | {
            "total": total,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "tokens": tokens,
            "flops": flops,
            "tokens_per_s": tokens / elapsed,
            "tflops_per_s": flops / elapsed / engine.world_size / 1e12,
            "data_wait": data_wait_s / elapsed,
        }
        if peak_flops_per_s:
            metrics["mfu"] = flops / elapsed / engine.world_size / peak_flops_per_s
        finite = np.isfinite([total, grad_norm]).all()
        bad = [] if finite else [number for number, part in enumerate(sums) if not part.isfinite().all()]
        after_step(StepReport(step, metrics, observed, int(rows), int(content), bool(noticed), bad, seconds))
        watch.lap("between")
        clock = time.perf_counter()


@torch.no_grad()
def evaluate(
    engine: Engine,
    objective: Objective,
    stream: Iterable[tuple[int, list[Any]]],
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """(losses, observations) over all of a stream, as `train` takes them over a step. Every rank has as many micro-batches."""
    names, counts, sums, passed = list(objective.weights), 0, 0, []
    for _, batches in stream:
        counts = counts + _counts(objective, batches)
        for batch in batches:
            terms = engine.forward(batch)
            sums = sums + torch.stack([terms[name].sum.detach().double() for name in names])
            passed.append({name: term for name, term in terms.items() if name not in names})
    counts = dict(zip(names, sum_over_ranks(counts.to(engine.device)).tolist(), strict=True))
    means = _means(names, sum_over_ranks(sums), counts)
    means["total"] = sum(weight * means[name] for name, weight in objective.weights.items())
    return means, _observations(passed, names, sum_over_ranks)


def _counts(objective: Objective, batches: list[Any]) -> torch.Tensor:
    """[terms] float64, of this rank."""
    counts = [objective.counts(batch) for batch in batches]
    return torch.tensor([float(sum(c[name] for c in counts)) for name in objective.weights], dtype=torch.float64)


def _work(objective: Objective, batches: list[Any], noticed: bool) -> torch.Tensor:
    """[tokens, FLOPs, rows, content, notices] float64 of this rank: sums of whole numbers below 2**53 stay exact."""
    work = [(len(b.stream.input_ids), objective.flops(b), b.rows, b.content) for b in batches]
    return torch.tensor([*map(sum, zip(*work, strict=True)), float(noticed)], dtype=torch.float64)


def _loss(weights: dict[str, float], counts: dict[str, float], terms: Terms) -> torch.Tensor:
    """This rank's part of the loss. Every term is divided by its count over all ranks and micro-batches of the step, so that how
    rows fall on ranks never changes a gradient."""
    return sum(weight * terms[n].sum / max(1.0, counts[n]) for n, weight in weights.items() if weight)


def _means(names: list[str], sums: torch.Tensor, counts: dict[str, float]) -> dict[str, float]:
    return {name: value / max(1.0, counts[name]) for name, value in zip(names, sums.tolist(), strict=True)}


def _observations(passed: list[Terms], names: list[str], sum_over_ranks: Callable) -> dict[str, np.ndarray]:
    others = [name for name in (passed[0] if passed else {}) if name not in names]
    return {name: sum_over_ranks(sum(terms[name].sum for terms in passed)).cpu().numpy() for name in others}
