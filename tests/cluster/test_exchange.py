"""A step's gradient is that of one process: any ranks, any number of backward calls, whenever gradients are exchanged."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from cluster.collectives import all_gather, rank, world_size
from cluster.engine import Engine, EngineConfig, open_engine
from cluster.torch_engine import TorchEngine
from tests.ranks import on_ranks, small_weights_shared

CALLS = (1, 2, 5)  # of backward, in three steps one after the other
READABLE = EngineConfig(eps=1.0, betas=(0.0, 0.0))
CASES = [
    *itertools.product((0, 1), ("step",), ("none",)),
    *itertools.product((2, 3), ("step", "micro_batch"), ("none",)),
    *itertools.product((1, 2, 3), ("step",), ("cpu",)),
    *itertools.product((2, 3), ("micro_batch",), ("cpu",)),
]
PAIRS = 40


class Encoder(nn.Module):
    """Embeddings, and a scalar that every forward pass computes anew from its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 7), nn.Linear(7, 5)
        self.log_scale = nn.Parameter(torch.tensor([0.3]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.outer(torch.tanh(self.inner(x))), self.log_scale.exp()


def build() -> Encoder:
    torch.manual_seed(0)
    return Encoder()


def pairs(step: int) -> Tensor:
    return torch.randn(2, PAIRS, 6, generator=torch.Generator().manual_seed(step))


def contrastive(queries: Tensor, candidates: Tensor, scale: Tensor, first: int) -> Tensor:
    """Sum over these queries, of which the first has the number `first`, over the count of all."""
    labels = first + torch.arange(len(queries))
    return nn.functional.cross_entropy(scale * queries @ candidates.T, labels, reduction="sum") / PAIRS


def whole_step(engine: Engine, step: int) -> float:
    queries, candidates = pairs(step)
    (q, scale), (c, _) = engine.forward(queries), engine.forward(candidates)
    engine.backward(contrastive(q, c, scale, 0), last=True)
    return engine.step(1.0)


def cached_step(engine: Engine, step: int, calls: int) -> float:
    """GradCache: embeddings without gradient, the loss on those of all ranks, then chunk after chunk with its gradient."""
    mine = pairs(step).chunk(world_size(), dim=1)[rank()]
    chunks = mine.tensor_split(calls, dim=1)
    with torch.no_grad():
        seen = [engine.forward(chunk) for chunk in chunks]
    (q, c), scale = torch.cat([embedded for embedded, _ in seen], dim=1).detach(), seen[0][1].detach()
    everybody = all_gather(c)
    first = rank() * mine.shape[1]
    for tensor in (q, everybody, scale):
        tensor.requires_grad_()
    contrastive(q, everybody, scale, first).backward()
    of_candidates = sum(all_gather(everybody.grad[None]))[first : first + len(c)]
    wanted = torch.stack([q.grad, of_candidates]).tensor_split(calls, dim=1)
    for number, (chunk, gradient) in enumerate(zip(chunks, wanted, strict=True), start=1):
        embedded, now = engine.forward(chunk)
        surrogate = (embedded * gradient).sum() + (now * scale.grad).sum() / calls
        engine.backward(surrogate, last=number == calls)
    return engine.step(1.0)


def gradients(engine: Engine, take_step: Callable[[Engine, int], float]) -> list[tuple[dict[str, Tensor], float]]:
    """(gradient, norm) of three steps, from the updates: with betas 0 and eps 1, AdamW moves a weight by g / (|g| + 1)."""
    found = []
    for step in range(len(CALLS)):
        before, norm, after = engine.weights(), take_step(engine, step), engine.weights()
        moved = {name: before[name] - after[name] for name in before}
        found.append(({name: update / (1 - update.abs()) for name, update in moved.items()}, norm))
    return found


@small_weights_shared()
def steps_on_ranks() -> dict[tuple, list]:
    found = {}
    for stage, exchange, offload in CASES:
        config = replace(READABLE, zero_stage=stage, gradient_exchange=exchange, offload_optimizer=offload)
        engine = open_engine(build(), config)
        found[stage, exchange, offload] = gradients(engine, lambda engine, step: cached_step(engine, step, CALLS[step]))
        engine.close()
    return found


@cache
def alone() -> list[tuple[dict[str, Tensor], float]]:
    return gradients(TorchEngine(build(), READABLE), whole_step)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_ranks_stage_chunks_and_exchange_give_the_gradients_of_one_process(ranks: int) -> None:
    for case, steps in on_ranks(steps_on_ranks, ranks).items():
        for calls, (found, norm), (expected, expected_norm) in zip(CALLS, steps, alone(), strict=True):
            assert norm == pytest.approx(expected_norm, rel=2e-6), (case, calls)
            for name, gradient in expected.items():
                assert gradient.abs().max() > 1e-3
                difference = (found[name] - gradient).abs().max().item()
                assert difference < 1e-6, (case, calls, name, difference)


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 3))

    def forward(self, scale: float) -> Tensor:
        return (self.weight * scale).sum()


@small_weights_shared()
def many_small_gradients() -> dict[tuple, float]:
    found = {}
    for stage, exchange, offload in CASES:
        config = EngineConfig("bf16", zero_stage=stage, gradient_exchange=exchange, offload_optimizer=offload)
        engine = open_engine(Line(), config)
        engine.backward(engine.forward(1.0), last=False)
        for micro in range(32):
            engine.backward(engine.forward(2.0**-9), last=micro == 31)  # added to 1 in bf16 this is nothing
        found[stage, exchange, offload] = engine.step(0.0) / 3 / engine.world_size
        engine.close()
    return found


def test_gradients_too_small_for_bf16_add_up_over_micro_batches() -> None:
    for case, found in on_ranks(many_small_gradients, 2).items():
        assert found == pytest.approx(1 + 32 * 2**-9, rel=2**-8), case  # bf16 alone would say 1
