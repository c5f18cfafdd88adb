"""A run goes on with another number of ranks: 4, then 2, then 3 of them take the steps that 4 would have taken."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cluster.checkpoint import consolidate
from cluster.collectives import all_reduce_sum
from cluster.engine import Engine, EngineConfig, open_engine
from tests.ranks import on_ranks, small_weights_shared

STAGES = (0, 1, 2, 3)
CONFIG = EngineConfig(weight_decay=0.1, max_grad_norm=1.0)
ROWS = 24  # of a step, for 4, 2 and 3 ranks in 1, 2 and 4 micro-batches
MICRO_BATCHES = {4: 1, 2: 2, 3: 4}
STEPS = 9


class Classifier(nn.Module):
    """Norms and biases decay by nothing, the frozen part is in no checkpoint, and 3 ranks divide none of the sizes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(5, 7).requires_grad_(False)
        self.norm, self.middle, self.head = nn.LayerNorm(7), nn.Linear(7, 11), nn.Linear(11, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.frozen(x.to(self.frozen.weight.dtype)))
        return self.head(torch.tanh(self.middle(hidden))).float()


def train(engine: Engine, steps: range) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step."""
    seen, count = [], MICRO_BATCHES[engine.world_size]
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, labels = torch.randn(ROWS, 5, generator=generator), torch.randint(0, 4, (ROWS,), generator=generator)
        share = slice(engine.rank * count, (engine.rank + 1) * count)
        parts = list(zip(x.chunk(engine.world_size * count), labels.chunk(engine.world_size * count), strict=True))
        total = torch.zeros(())
        for number, (part, label) in enumerate(parts[share], start=1):
            loss = nn.functional.cross_entropy(engine.forward(part), label, reduction="sum") / ROWS
            engine.backward(loss, last=number == count)
            total += loss.detach()
        seen.append((all_reduce_sum(total).item(), engine.step(0.02)))
    return seen


@small_weights_shared()
def leg(folder: str, start: int, end: int) -> dict[int, list]:
    """From the checkpoint of step `start` to that of `end`, at every stage; 4 ranks also go all the way."""
    curves = {}
    for stage in STAGES:
        engine = open_engine(Classifier(), replace(CONFIG, zero_stage=stage))
        if start:
            assert engine.load(f"{folder}/{stage}-{start}") == {"step": start}
        curves[stage] = train(engine, range(start, end))
        engine.save(f"{folder}/{stage}-{end}", {"step": end})
        if engine.world_size == 4:
            curves[stage] += train(engine, range(end, STEPS))
            engine.save(f"{folder}/{stage}-undisturbed", {})
        engine.close()
    return curves


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("MOCA_CACHE", str(folder / "cache"))
        yield folder


@pytest.mark.slow
def test_four_two_and_three_ranks_follow_the_curve_of_four(folder: Path) -> None:
    of_four = on_ranks(leg, 4, str(folder), 0, 3)
    of_two = on_ranks(leg, 2, str(folder), 3, 6)
    of_three = on_ranks(leg, 3, str(folder), 6, STEPS)
    for stage in STAGES:
        undisturbed = of_four[stage]
        changed = undisturbed[:3] + of_two[stage] + of_three[stage]
        torch.testing.assert_close(torch.tensor(changed), torch.tensor(undisturbed), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.tensor(undisturbed), torch.tensor(of_four[0]), rtol=1e-5, atol=1e-6)
        expected = consolidate(str(folder / f"{stage}-undisturbed"))
        for name, weight in consolidate(str(folder / f"{stage}-{STEPS}")).items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
        assert (expected["middle.weight"] - Classifier().middle.weight).abs().max() > 0.05, "nothing was learned"


@small_weights_shared()
def masters_on(folder: str, save: bool) -> dict[int, dict[str, Tensor]]:
    """The fp32 weights under a bf16 training at every stage, after three steps of 4 ranks or as loaded from there."""
    masters = {}
    for stage in STAGES:
        engine = open_engine(Classifier(), replace(CONFIG, precision="bf16", zero_stage=stage))
        if save:
            train(engine, range(3))
            engine.save(f"{folder}/bf16-{stage}", {})
        else:
            engine.load(f"{folder}/bf16-{stage}")
        masters[stage] = engine.weights()
        norms = [norm for _, norm in train(engine, range(3, 5))]
        assert all(map(math.isfinite, norms))
        engine.close()
    return masters


@pytest.mark.slow
def test_three_ranks_take_up_the_masters_of_four_to_the_bit(folder: Path) -> None:
    saved = on_ranks(masters_on, 4, str(folder), True)
    loaded = on_ranks(masters_on, 3, str(folder), False)
    for stage, masters in saved.items():
        assert all(torch.equal(loaded[stage][name], weight) for name, weight in masters.items()), stage
        assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in masters.values())
