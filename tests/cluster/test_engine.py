"""Both engines do the same steps: any ZeRO stage, any split of the rows over ranks and micro-batches."""

import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cluster.checkpoint import consolidate, read_manifest
from cluster.collectives import all_gather, all_gather_with_grad, all_reduce_sum, rank, world_size
from cluster.deepspeed_config import disable_shm_op, zero_config
from cluster.deepspeed_engine import DeepSpeedEngine
from cluster.engine import Engine, EngineConfig, open_engine
from cluster.torch_engine import TorchEngine
from tests.ranks import on_ranks, small_weights_shared

STAGES = (0, 1, 2, 3)
STEPS = 4
LR = 0.5
# A large eps makes Adam's update proportional to the gradient: a wrong scale shows at the first step.
CONFIG = EngineConfig(weight_decay=0.1, eps=1.0)
BF16 = dataclasses.replace(CONFIG, precision="bf16")
CLIPPED = dataclasses.replace(CONFIG, max_grad_norm=0.1)


class Tied(nn.Module):
    """Everything that checkpoints get wrong: tied weights, a frozen part, buffers, norms and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.frozen = self.also_frozen = nn.Linear(8, 8, bias=False).requires_grad_(False)
        self.norm = nn.LayerNorm(8)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("frequencies", torch.linspace(0.1, 1.2345678, 8))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = (self.embed(ids) * self.frequencies).to(self.embed.weight.dtype)
        hidden = self.norm(hidden + self.frozen(hidden))
        return self.head(torch.tanh(self.middle(hidden))).float()


def build() -> Tied:
    torch.manual_seed(0)
    return Tied().eval()  # as transformers loads a model


def rows(step: int, part: int | None) -> Tensor:
    """The rows (id, label) of a step; `part`: one of the unequal shares of 2 ranks x 2 micro-batches, None: all."""
    everything = torch.randint(0, 11, (12, 2), generator=torch.Generator().manual_seed(step))
    return everything if part is None else everything.split([5, 1, 4, 2])[part]


def train(engine: Engine, steps: range, micro_batches: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step; a loss is a sum of this rank's rows over the count of all."""
    seen = []
    for step in steps:
        loss_sum = torch.zeros(())
        for micro in range(micro_batches):
            part = rows(step, None if engine.world_size == 1 else engine.rank * micro_batches + micro)
            logits = engine.forward(part[:, 0])
            loss = nn.functional.cross_entropy(logits, part[:, 1], reduction="sum") / 12
            engine.backward(loss, last=micro == micro_batches - 1)
            loss_sum += loss.detach()
        seen.append((all_reduce_sum(loss_sum).item(), engine.step(LR * (step + 1))))
    return seen


def alone(config: EngineConfig, steps: int = STEPS) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """What a single process does with all rows in one batch."""
    engine = TorchEngine(build(), config)
    return train(engine, range(steps), 1), engine.module.state_dict()


def live_weights(engine: Engine) -> dict[str, Tensor]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: weight.detach().clone() for name, weight in engine.module.state_dict().items()}


def poison(engine: Engine) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """A step of which one micro-batch is NaN: its norm, and the weights before and after."""
    before = live_weights(engine)
    for factor, last in ((math.nan, False), (1.0, True)):
        engine.backward(engine.forward(rows(9, 0)[:, 0]).sum() * factor, last=last)
    return engine.step(LR), before, live_weights(engine)


def contrastive(x: Tensor, weight: Tensor) -> Tensor:
    """This rank's rows against everybody's."""
    mine = x @ weight
    labels = torch.arange(len(mine)) + rank() * len(mine)
    return nn.functional.cross_entropy(mine @ all_gather_with_grad(mine * 2).T, labels, reduction="sum")


@small_weights_shared()
def two_ranks(folder: str) -> dict[str, object]:
    found: dict[str, object] = {}
    for stage in STAGES:
        config = dataclasses.replace(CONFIG, zero_stage=stage)
        engine = open_engine(build(), config)
        curve = train(engine, range(2), 2)
        engine.save(f"{folder}/half{stage}", {"step": 2, "lr": 0.1})
        curve += train(engine, range(2, STEPS), 2)
        found[f"training{stage}"] = engine.module.middle.training
        engine.save(f"{folder}/whole{stage}", {"step": STEPS})
        found[f"curve{stage}"], found[f"live{stage}"] = curve, live_weights(engine)
        weights = engine.weights()
        found[f"weights{stage}"] = weights, all_gather(torch.tensor([len(weights)])).tolist()
        engine.close()

        engine = open_engine(build(), config)
        found[f"state{stage}"] = engine.load(f"{folder}/half{stage}")
        found[f"resumed{stage}"] = train(engine, range(2, STEPS), 2), live_weights(engine)
        found[f"poisoned-fp32-{stage}"] = poison(engine)
        engine.close()

        engine = open_engine(build(), dataclasses.replace(CLIPPED, zero_stage=stage))
        found[f"clipped{stage}"] = train(engine, range(STEPS), 2), live_weights(engine)
        engine.close()

        engine = open_engine(build(), dataclasses.replace(config, precision="bf16"))
        curve = train(engine, range(STEPS), 2)
        found[f"bf16{stage}"] = curve, engine.module.embed.weight.dtype, engine.module.frequencies.clone()
        engine.save(f"{folder}/bf16-{stage}", {})
        found[f"bf16-weights{stage}"] = engine.weights()
        found[f"poisoned-bf16-{stage}"] = poison(engine)
        engine.close()

    weight = torch.ones(3, 2, requires_grad=True)
    x = torch.arange(24.0).reshape(8, 3).sin()
    contrastive(x.chunk(2)[rank()], weight).backward()
    found["contrastive"] = all_reduce_sum(weight.grad)
    found["gathered"] = all_gather(torch.full((2, 1), float(rank())))
    found["sizes"] = rank(), world_size()
    return found


def one_rank(folder: str) -> dict[str, object]:
    """Two ranks' checkpoints taken up by one; and what one rank does in bf16."""
    found: dict[str, object] = {}
    for kind in (DeepSpeedEngine, TorchEngine):
        module, name = build(), kind.__name__
        for parameter in module.parameters():  # DeepSpeed's masters start from weights rounded to bf16, ours from fp32
            parameter.data = parameter.data.bfloat16().float()
        engine = kind(module, BF16)
        found[f"bf16-{name}"] = train(engine, range(STEPS), 2)
        engine.save(f"{folder}/bf16-{name}", {})
        engine.close()
    for saved, stage in ((0, 0), (1, 2), (2, 1), (3, 3)):
        engine = open_engine(build(), dataclasses.replace(CONFIG, zero_stage=stage))
        found[f"state{saved}{stage}"] = engine.load(f"{folder}/half{saved}")
        found[f"curve{saved}{stage}"] = train(engine, range(2, STEPS), 1)
        if stage in (1, 2):
            with pytest.raises(ValueError, match="set zero_stage=3"):
                engine.load(f"{folder}/half3")
        with pytest.raises(ValueError, match="and cannot continue in a"):
            engine.load(f"{folder}/half{0 if stage else 1}")
        engine.close()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("engine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("MOCA_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict:
    return on_ranks(two_ranks, 2, str(folder))


@pytest.fixture(scope="module")
def found_alone(found: dict, folder: Path) -> dict:
    return on_ranks(one_rank, 1, str(folder))


def assert_same_curve(one: list, other: list) -> None:
    torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-5, atol=1e-6)


def assert_same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert set(one) == set(other)
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("stage", STAGES)
def test_zero_equals_one_process(found: dict, stage: int) -> None:
    curve, weights = alone(CONFIG)
    assert_same_curve(found[f"curve{stage}"], curve)
    assert_same_weights(found[f"live{stage}"], weights)
    start = build().state_dict()
    assert not torch.allclose(weights["middle.weight"], start["middle.weight"], atol=1e-2)  # it did train
    assert torch.equal(weights["frozen.weight"], start["frozen.weight"])


@pytest.mark.parametrize("stage", STAGES)
def test_the_module_trains_in_training_mode(found: dict, stage: int) -> None:
    assert found[f"training{stage}"]


@pytest.mark.parametrize("stage", STAGES)
def test_clipping_equals_one_process(found: dict, stage: int) -> None:
    curve, weights = alone(CLIPPED)
    seen, live = found[f"clipped{stage}"]
    assert_same_curve(seen, curve)
    assert_same_weights(live, weights)
    assert min(norm for _, norm in seen) > CLIPPED.max_grad_norm  # before clipping
    assert not torch.allclose(weights["middle.weight"], alone(CONFIG)[1]["middle.weight"], atol=1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_is_bit_equal(found: dict, stage: int) -> None:
    curve, live = found[f"resumed{stage}"]
    assert curve == found[f"curve{stage}"][2:]
    assert all(torch.equal(live[name], weight) for name, weight in found[f"live{stage}"].items())
    assert found[f"state{stage}"] == {"step": 2, "lr": 0.1}


@pytest.mark.parametrize("stage", STAGES)
def test_consolidate_equals_live_weights(found: dict, folder: Path, stage: int) -> None:
    weights = consolidate(str(folder / f"whole{stage}"))
    live = found[f"live{stage}"]
    assert set(weights) == set(live) - {"frozen.weight", "also_frozen.weight"}
    assert "head.weight" in weights
    assert all(torch.equal(weights[name], live[name]) for name in weights)


@pytest.mark.parametrize("stage", STAGES)
def test_live_weights_in_fp32_on_the_first_rank(found: dict, folder: Path, stage: int) -> None:
    weights, sizes = found[f"weights{stage}"]
    assert sizes == [len(weights), 0]
    trained = {name for name, parameter in build().named_parameters() if parameter.requires_grad}
    assert set(weights) == trained and "head.weight" not in trained  # tied to the embedding
    assert all(torch.equal(weight, found[f"live{stage}"][name]) for name, weight in weights.items())
    masters = consolidate(str(folder / f"bf16-{stage}"))
    assert all(torch.equal(weight, masters[name]) for name, weight in found[f"bf16-weights{stage}"].items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_poisoned_gradient_changes_nothing(found: dict, stage: int, precision: str) -> None:
    norm, before, after = found[f"poisoned-{precision}-{stage}"]
    assert norm == math.inf
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_follows_fp32_and_keeps_fp32_buffers(found: dict, stage: int) -> None:
    curve, dtype, frequencies = found[f"bf16{stage}"]
    torch.testing.assert_close(torch.tensor(curve), torch.tensor(alone(CONFIG)[0]), rtol=0.05, atol=0)
    assert dtype == torch.bfloat16
    assert torch.equal(frequencies, build().frequencies)


def test_gathered_gradient_equals_one_process(found: dict) -> None:
    weight = torch.ones(3, 2, requires_grad=True)
    contrastive(torch.arange(24.0).reshape(8, 3).sin(), weight).backward()
    torch.testing.assert_close(found["contrastive"], weight.grad)
    assert found["gathered"].tolist() == [[0.0], [0.0], [1.0], [1.0]]
    assert found["sizes"] == (0, 2)
    assert (rank(), world_size()) == (0, 1)


def test_other_ranks_and_stages_continue(found: dict, found_alone: dict, folder: Path) -> None:
    for pair in ("00", "12", "21", "33"):
        assert found_alone[f"state{pair}"]["step"] == 2
        assert_same_curve(found_alone[f"curve{pair}"], found["curve2"][2:])
    assert not [path for path in (folder / "cache").iterdir() if path.is_dir()]


def test_torch_engine_resumes_bit_equal(tmp_path: Path) -> None:
    engine = TorchEngine(build(), CONFIG)
    train(engine, range(2), 1)
    engine.save(str(tmp_path), {"step": 2})
    curve = train(engine, range(2, STEPS), 1)
    other = TorchEngine(build(), CONFIG)
    assert other.load(str(tmp_path)) == {"step": 2}
    assert train(other, range(2, STEPS), 1) == curve
    trained = set(build().state_dict()) - {"frozen.weight", "also_frozen.weight"}
    assert set(consolidate(str(tmp_path))) == trained


def test_torch_engine_does_bf16_as_deepspeed_does(found_alone: dict, folder: Path) -> None:
    names = [f"bf16-{engine.__name__}" for engine in (TorchEngine, DeepSpeedEngine)]
    assert_same_curve(*(found_alone[name] for name in names))
    assert_same_weights(*(consolidate(str(folder / name)) for name in names))


def test_torch_engine_survives_a_poisoned_gradient() -> None:
    engine = TorchEngine(build(), EngineConfig())
    before = {name: weight.clone() for name, weight in engine.module.state_dict().items()}
    engine.backward(engine.forward(rows(0, 0)[:, 0]).sum() * math.nan, last=True)
    assert engine.step(LR) == math.inf
    assert all(torch.equal(before[name], weight) for name, weight in engine.module.state_dict().items())


def test_a_step_ends_with_its_last_backward() -> None:
    engine = TorchEngine(build(), CONFIG)
    engine.backward(engine.forward(rows(0, 0)[:, 0]).sum(), last=False)
    with pytest.raises(AssertionError, match="before the last backward"):
        engine.step(LR)
    engine.backward(engine.forward(rows(0, 1)[:, 0]).sum(), last=True)
    with pytest.raises(AssertionError, match="after the last one"):
        engine.backward(engine.forward(rows(0, 1)[:, 0]).sum(), last=True)
    assert engine.step(LR) > 0


def test_incomplete_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no complete checkpoint"):
        consolidate(str(tmp_path))
    TorchEngine(build(), CONFIG).save(str(tmp_path), {})
    with pytest.raises(ValueError, match="'torch' engine"):
        read_manifest(str(tmp_path), kind="zero")


@pytest.mark.parametrize(
    ("field", "value"),
    [("precision", "fp16"), ("zero_stage", 4), ("max_grad_norm", -1.0), ("eps", 0.0)],
)
def test_bad_config_names_field_and_value(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field}.*{value}"):
        EngineConfig(**{field: value})


def test_clipping_is_explicit_in_the_deepspeed_config() -> None:
    assert zero_config(EngineConfig(), 10)["gradient_clipping"] == 0.0
    assert zero_config(CLIPPED, 10)["gradient_clipping"] == 0.1


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no parameter with requires_grad: nothing to train"):
        TorchEngine(nn.Linear(2, 2).requires_grad_(False), EngineConfig())


def test_shm_op_stays_switchable() -> None:
    """The name is DeepSpeed's own: if it moves, CPU starts would compile C++ again."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.ops

    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__
    disable_shm_op()
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False
