"""The engine of one process: bf16 under fp32 masters against AdamW written out, and what becomes of frozen weights."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cluster.checkpoint import consolidate
from cluster.engine import EngineConfig
from cluster.torch_engine import TorchEngine


class Products(nn.Module):
    """A head tied to its embedding, an untied matrix and a vector, and a buffer that bf16 could not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.middle = nn.Linear(4, 4)
        self.unused = nn.Linear(2, 2, bias=False)
        self.register_buffer("frequencies", torch.full((4,), 1 + 2**-20))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = (self.embed(ids) * self.frequencies).to(self.embed.weight.dtype)
        return self.head(torch.tanh(self.middle(hidden))).float().square().sum()


def build() -> Products:
    torch.manual_seed(0)
    return Products()


def ids(step: int, micro: int) -> Tensor:
    return torch.randint(0, 5, (6,), generator=torch.Generator().manual_seed(10 * step + micro))


def train(engine: TorchEngine, steps: range, micro_batches: int) -> list[float]:
    norms = []
    for step in steps:
        for micro in range(micro_batches):
            engine.backward(engine.forward(ids(step, micro)), last=micro == micro_batches - 1)
        norms.append(engine.step(1e-3))
    return norms


def by_hand(
    module: Products, config: EngineConfig, steps: int, micro_batches: int
) -> tuple[dict[str, Tensor], list[float]]:
    """The masters after AdamW as in its paper, of bf16 weights whose gradients are summed in fp32; and the norms."""
    names = [name for name, _ in module.named_parameters()]
    masters = {name: p.data.clone() for name, p in module.named_parameters()}
    moments = {name: (torch.zeros_like(m), torch.zeros_like(m)) for name, m in masters.items()}
    module = module.to(torch.bfloat16)
    module.frequencies = torch.full((4,), 1 + 2**-20)
    norms = []
    for step in range(steps):
        sums = {name: torch.zeros_like(m) for name, m in masters.items()}
        for micro in range(micro_batches):
            grads = torch.autograd.grad(module(ids(step, micro)), list(module.parameters()), allow_unused=True)
            for name, grad in zip(names, grads, strict=True):
                sums[name] += 0 if grad is None else grad.float()
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in sums.values()]))
        norms.append(norm.item())
        for name, parameter in module.named_parameters():
            grad = sums[name] * torch.clamp(config.max_grad_norm / (norm + 1e-6), max=1.0)
            beta1, beta2 = config.betas
            if parameter.dim() > 1:
                masters[name] *= 1 - 1e-3 * config.weight_decay
            first, second = moments[name]
            first.lerp_(grad, 1 - beta1)
            second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            rescale = (1 - beta2 ** (step + 1)) ** 0.5
            pace = 1e-3 / (1 - beta1 ** (step + 1))
            masters[name].addcdiv_(first, (second.sqrt() / rescale).add_(config.eps), value=-pace)
            parameter.data.copy_(masters[name])
    return masters, norms


def test_bf16_is_adamw_on_fp32_masters_exactly(tmp_path: Path) -> None:
    config = EngineConfig("bf16", max_grad_norm=0.5, weight_decay=0.1)
    engine = TorchEngine(build(), config)
    norms = train(engine, range(5), 3)
    masters, expected = by_hand(build(), config, 5, 3)
    assert norms == expected and min(norms) > 0.5  # clipped
    engine.save(str(tmp_path), {})
    saved = consolidate(str(tmp_path))
    for name, master in masters.items():
        assert torch.equal(saved[name], master), name
        assert torch.equal(engine.module.get_parameter(name), master.bfloat16()), name
        assert not torch.equal(master, build().state_dict()[name]), name
    assert torch.equal(saved["head.weight"], saved["embed.weight"])
    assert engine.module.head.weight is engine.module.embed.weight
    assert torch.equal(engine.module.frequencies, torch.full((4,), 1 + 2**-20))


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 3))

    def forward(self, scale: float) -> Tensor:
        return (self.weight * scale).sum()


def test_updates_too_small_for_bf16_add_up(tmp_path: Path) -> None:
    """Adam moves a weight by the learning rate: 1e-5 a step, where bf16 knows nothing between 1 and 0.996."""
    engine = TorchEngine(Line(), EngineConfig("bf16"))
    for _ in range(500):
        engine.backward(engine.forward(1.0), last=True)
        engine.step(1e-5)
    engine.save(str(tmp_path), {})
    torch.testing.assert_close(consolidate(str(tmp_path))["weight"], torch.full((3, 3), 0.995), rtol=0, atol=1e-5)
    assert engine.module.weight.dtype == torch.bfloat16
    assert (engine.module.weight < 1).all()


def test_gradients_too_small_for_bf16_add_up_over_micro_batches() -> None:
    engine = TorchEngine(Line(), EngineConfig("bf16"))
    engine.backward(engine.forward(1.0), last=False)
    for micro in range(100):
        engine.backward(engine.forward(2.0**-10), last=micro == 99)  # added to 1 in bf16 this is nothing
        assert engine.module.weight.grad is None
    assert engine.step(0.0) == pytest.approx(3 * (1 + 100 * 2**-10))


def test_bf16_resumes_bit_equal_from_its_masters(tmp_path: Path) -> None:
    config = EngineConfig("bf16", weight_decay=0.1)
    engine = TorchEngine(build(), config)
    train(engine, range(3), 1)
    engine.save(str(tmp_path / "half"), {"step": 3})
    norms = train(engine, range(3, 6), 1)
    engine.save(str(tmp_path / "whole"), {})
    resumed = TorchEngine(build(), config)
    assert resumed.load(str(tmp_path / "half")) == {"step": 3}
    assert train(resumed, range(3, 6), 1) == norms
    resumed.save(str(tmp_path / "again"), {})
    whole, again = (consolidate(str(tmp_path / name)) for name in ("whole", "again"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_poisoned_gradient_leaves_the_masters_alone(tmp_path: Path) -> None:
    engine = TorchEngine(build(), EngineConfig("bf16"))
    engine.backward(engine.forward(ids(0, 0)) * math.nan, last=True)
    assert engine.step(1e-3) == math.inf
    engine.save(str(tmp_path), {})
    saved = consolidate(str(tmp_path))
    assert all(torch.equal(saved[name], weight) for name, weight in build().state_dict().items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_frozen_stays_and_is_no_part_of_a_checkpoint(tmp_path: Path, precision: str) -> None:
    def frozen(value: float) -> Products:
        module = build()
        module.embed.weight.requires_grad_(False)
        module.embed.weight.data.fill_(value)
        return module

    engine = TorchEngine(frozen(0.5), EngineConfig(precision))
    train(engine, range(3), 1)
    assert (engine.module.head.weight == 0.5).all()
    engine.save(str(tmp_path), {})
    assert set(consolidate(str(tmp_path))) == {"middle.weight", "middle.bias", "unused.weight", "frequencies"}
    other = TorchEngine(frozen(0.25), EngineConfig(precision))
    other.load(str(tmp_path))
    assert (other.module.head.weight == 0.25).all()
    assert torch.equal(other.module.middle.weight, engine.module.middle.weight)
    with pytest.raises(ValueError, match=r"it lacks \['embed.weight'\]"):
        TorchEngine(build(), EngineConfig(precision)).load(str(tmp_path))


def test_the_module_trains_in_training_mode() -> None:
    """A model comes from disk in evaluation mode, in which transformers leaves out activation checkpointing."""
    assert TorchEngine(build().eval(), EngineConfig()).module.middle.training


@pytest.mark.gpu
def test_cuda_steps_as_the_cpu_does(tmp_path: Path) -> None:
    config = EngineConfig("bf16", max_grad_norm=0.5, weight_decay=0.1)
    for device in ("cpu", "cuda"):
        engine = TorchEngine(build(), config, device)
        for step in range(4):
            for micro in range(2):
                engine.backward(engine.forward(ids(step, micro).to(device)), last=micro == 1)
            engine.step(1e-3)
        engine.save(str(tmp_path / device), {})
    cpu, cuda = (consolidate(str(tmp_path / device)) for device in ("cpu", "cuda"))
    for name, weight in cpu.items():
        torch.testing.assert_close(cuda[name], weight, rtol=0, atol=4e-3)
    assert engine._optimizer.param_groups[0]["fused"]
    for saved, device in (("cpu", "cuda"), ("cuda", "cpu")):  # a checkpoint goes from one to the other
        other = TorchEngine(build(), config, device)
        other.load(str(tmp_path / saved))
        other.backward(other.forward(ids(5, 0).to(device)), last=False)
        other.backward(other.forward(ids(5, 1).to(device)), last=True)
        assert math.isfinite(other.step(1e-3))
