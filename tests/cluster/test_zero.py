"""What ranks share and what leaves the device: settings that fit together, and offloaded training that is the same training."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cluster.checkpoint import consolidate
from cluster.engine import EngineConfig, open_engine
from cluster.session import ClusterConfig
from cluster.torch_engine import TorchEngine
from tests.ranks import on_ranks, small_weights_shared

CONFIG = EngineConfig(eps=1.0, weight_decay=0.1, max_grad_norm=1.0)
OFFLOADS = [
    {"zero_stage": 1, "offload_optimizer": "cpu"},
    {"zero_stage": 2, "offload_optimizer": "cpu", "gradient_exchange": "micro_batch"},
    {"zero_stage": 3, "offload_optimizer": "cpu"},
    {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
    {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu", "precision": "bf16"},
]
STEPS = 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.to(self.layers[0].weight.dtype)).float().square().sum() / 4


def train(engine, steps: range) -> list[float]:
    norms = []
    for step in steps:
        rows = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        first, second = rows.chunk(engine.world_size)[engine.rank].chunk(2)
        engine.backward(engine.forward(first), last=False)
        engine.backward(engine.forward(second), last=True)
        norms.append(engine.step(0.5))
    return norms


@small_weights_shared()
def offloaded(folder: str) -> list[dict]:
    found = []
    for number, settings in enumerate(OFFLOADS):
        config = replace(CONFIG, **settings)
        engine = open_engine(Net(), config)
        norms = train(engine, range(STEPS // 2))
        engine.save(f"{folder}/half{number}", {})
        norms += train(engine, range(STEPS // 2, STEPS))
        weights = engine.weights()
        engine.save(f"{folder}/whole{number}", {})
        engine.backward(engine.forward(torch.ones(2, 6)) * math.nan, last=True)
        poisoned = engine.step(0.5), engine.weights()
        engine.close()

        engine = open_engine(Net(), config)
        engine.load(f"{folder}/half{number}")
        resumed = train(engine, range(STEPS // 2, STEPS)), engine.weights()
        engine.close()
        found.append({"norms": norms, "weights": weights, "poisoned": poisoned, "resumed": resumed})
    return found


def test_offloaded_training_is_the_same_training(tmp_path: Path) -> None:
    for number, found in enumerate(on_ranks(offloaded, 2, str(tmp_path))):
        case = OFFLOADS[number]
        alone = TorchEngine(Net(), CONFIG)
        norms = train(alone, range(STEPS))
        near = {"rtol": 0.02, "atol": 0.01} if case.get("precision") == "bf16" else {"rtol": 1e-5, "atol": 1e-6}
        assert found["norms"] == pytest.approx(norms, rel=near["rtol"]), case
        torch.testing.assert_close(found["weights"], alone.weights(), **near)

        norm, untouched = found["poisoned"]
        assert norm == math.inf, case
        torch.testing.assert_close(untouched, found["weights"], rtol=0, atol=0)
        torch.testing.assert_close(consolidate(str(tmp_path / f"whole{number}")), found["weights"], rtol=0, atol=0)
        again, weights = found["resumed"]
        assert again == found["norms"][STEPS // 2 :], case
        torch.testing.assert_close(weights, found["weights"], rtol=0, atol=0)


@pytest.mark.parametrize("kind", [EngineConfig, ClusterConfig])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_stage": 4}, "zero_stage 4 must be 0, 1, 2 or 3"),
        ({"gradient_exchange": "never"}, "'never' must be 'step' or 'micro_batch'"),
        ({"gradient_exchange": "micro_batch", "zero_stage": 1}, "at zero_stage 1 saves no memory"),
        ({"offload_optimizer": "disk"}, "offload_optimizer 'disk' must be 'none', 'cpu' or 'nvme'"),
        ({"offload_optimizer": "cpu", "zero_stage": 0}, "'cpu' needs zero_stage 1 or more, not 0"),
        ({"offload_optimizer": "nvme", "zero_stage": 2}, "'nvme' needs zero_stage 3 or more, not 2"),
        ({"offload_optimizer": "cpu", "offload_parameters": "cpu"}, "offload_parameters 'cpu' needs zero_stage 3"),
        ({"offload_parameters": "cpu", "zero_stage": 3}, "set offload_optimizer too"),
        ({"offload_optimizer": "nvme", "zero_stage": 3}, "nvme_path None and an offload to 'nvme' need each other"),
        ({"nvme_path": "/disk"}, "nvme_path '/disk' and an offload to 'nvme' need each other"),
    ],
)
def test_settings_that_do_not_fit_are_refused(kind: type, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**settings)


def test_a_cluster_hands_its_settings_to_the_engine() -> None:
    settings = {"zero_stage": 3, "offload_optimizer": "cpu", "gradient_exchange": "micro_batch"}
    assert EngineConfig(**ClusterConfig(num_workers=4, **settings).shared()) == EngineConfig(**settings)


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))


def refusals() -> list[str]:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    on_disk = EngineConfig(zero_stage=3, offload_optimizer="nvme", nvme_path="/nowhere")
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
        for module, config in ((Scalar(), EngineConfig()), (Net(), on_disk)):
            with pytest.raises(ValueError) as refusal:
                open_engine(module, config)
            said.append(str(refusal.value))
    return said


def test_what_deepspeed_cannot_do_is_refused_at_the_start() -> None:
    scalar, disk = on_ranks(refusals, 1)
    assert "['scale'] have no dimension" in scalar and "the shape [1]" in scalar
    assert "async_io" in disk and "libaio-dev" in disk
