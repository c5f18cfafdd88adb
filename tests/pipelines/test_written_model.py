"""What a stage writes after training with frozen parts or adapters: the start model, where nothing was trained to the bit."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cluster import collectives
from cluster.deepspeed_engine import DeepSpeedEngine
from cluster.engine import Engine, EngineConfig
from cluster.torch_engine import TorchEngine
from moca_core.attention import set_attention
from moca_core.backbone import load_backbone
from moca_core.data.pairs import collate_pairs
from moca_core.data.render import Renderer, load_tokenizer
from moca_core.lora import Lora, add_adapters, target_layers
from moca_core.objective.contrastive import Contrastive, Gather
from moca_core.objective.contrastive_config import ContrastiveConfig
from moca_core.parts import freeze, parts_of
from moca_core.spec import read_spec
from moca_core.types import Pair
from pipelines.training.stage import write_model
from tests.core.samples import image, text, words
from tests.ranks import on_ranks
from tests.tiny import tiny_model

LORA = Lora(rank=2, alpha=4, targets=("language", "vision.qkv"))
FROZEN = ("vision", "embeddings")
PAIRS = [Pair("t", (text(words(6, n)), image(60, 60, n)), ((text(words(7, n + 9)),),), ()) for n in range(4)]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    path = str(tmp_path_factory.mktemp("start"))
    tiny_model(path, "qwen3_vl")
    yield path
    torch.set_num_threads(threads)


def objective(start: str, kind: str) -> Contrastive:
    """As the workers of `finetune` build it."""
    model = load_backbone(start)
    set_attention(model, "bidirectional")
    if kind == "lora":
        add_adapters(model, LORA, seed=0)
    elif kind == "frozen":
        freeze(model, FROZEN)
    gather = Gather(collectives.rank(), collectives.all_gather_with_grad, collectives.all_gather)
    return Contrastive(model, read_spec(start), ContrastiveConfig(temperature=0.5), gather=gather)


def train(engine: Engine, start: str, steps: range) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step."""
    share = len(PAIRS) // engine.world_size
    renderer = Renderer(load_tokenizer(f"{start}/tokenizer.json"), read_spec(start), 256)
    mine = PAIRS[engine.rank * share : (engine.rank + 1) * share]
    batch = collate_pairs(mine, renderer, num_negatives=0, sources=["t"], key=(0,))
    seen = []
    for step in steps:
        loss = engine.forward(batch)["contrastive"].sum / len(PAIRS)
        engine.backward(loss, last=True)
        seen.append((collectives.all_reduce_sum(loss).item(), engine.step(0.005 * (step + 1))))
    return seen


def settings(stage: int = 2, precision: str = "fp32") -> EngineConfig:
    return EngineConfig(precision, zero_stage=stage, eps=1e-2, weight_decay=0.1)


def written(start: str, checkpoint: str, kind: str, to: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    paths = write_model(checkpoint, start, "bidirectional", LORA if kind == "lora" else None, str(to))
    return load_backbone(str(to / paths["model"])).state_dict(), paths


def untrained(start: str, kind: str) -> set[str]:
    model = load_backbone(start)
    if kind == "lora":
        return set(model.state_dict()) - {f"{layer}.weight" for layer in target_layers(model, LORA.targets)}
    modules = {name: module for part in FROZEN for name, module in parts_of(model)[part].items()}
    return {f"{top}.{name}" for top, module in modules.items() for name in module.state_dict()}


@pytest.mark.parametrize(
    ("kind", "precision"), [("all", "fp32"), ("frozen", "bf16"), ("lora", "fp32"), ("lora", "bf16")]
)
def test_only_what_was_trained_is_written_anew(start: str, tmp_path: Path, kind: str, precision: str) -> None:
    engine = TorchEngine(objective(start, kind), settings(precision=precision))
    losses = [loss for loss, _ in train(engine, start, range(3))]
    assert losses[-1] < losses[0]
    engine.save(str(tmp_path / "checkpoint"), {})
    weights, paths = written(start, str(tmp_path / "checkpoint"), kind, tmp_path)
    before = load_backbone(start).state_dict()
    same = {name for name in before if torch.equal(before[name], weights[name])}
    if kind == "all":  # the head of a model that ties it is its embedding
        assert not same
    else:
        assert same == untrained(start, kind)
    assert paths == {"model": "model"} | ({"adapter": "adapter"} if kind == "lora" else {})
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists() == (kind == "lora")
    assert (tmp_path / "model" / "tokenizer.json").exists()
    if precision == "fp32":  # what was written is what was trained
        model = objective(str(tmp_path / "model"), "all")
        assert train(TorchEngine(model, settings()), str(tmp_path / "model"), range(1))[0][0] == pytest.approx(
            train(engine, start, range(1))[0][0], abs=1e-5
        )


def half_and_whole(folder: str, start: str, kind: str, stage: int) -> tuple[list, list]:
    """What four steps show, and the last two after a checkpoint; their models' checkpoints are `whole` and `resumed`."""
    engine = DeepSpeedEngine(objective(start, kind), settings(stage))
    curve = train(engine, start, range(2))
    engine.save(f"{folder}/half", {"step": 2})
    curve += train(engine, start, range(2, 4))
    engine.save(f"{folder}/whole", {"step": 4})
    engine.close()
    return curve, from_half(folder, start, kind, stage, "resumed")


def from_half(folder: str, start: str, kind: str, stage: int, name: str) -> list[tuple[float, float]]:
    engine = DeepSpeedEngine(objective(start, kind), settings(stage))
    assert engine.load(f"{folder}/half") == {"step": 2}
    curve = train(engine, start, range(2, 4))
    engine.save(f"{folder}/{name}", {"step": 4})
    engine.close()
    return curve


@pytest.mark.slow  # 10 to 20 s each; the quick tests have ZeRO with a frozen layer in tests/cluster, adapters above
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("kind", ["frozen", "lora"])
def test_two_ranks_train_and_write_what_one_process_does(
    start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, stage: int
) -> None:
    """Resumed to the bit, taken up by one rank, written, and with checkpoints of what is trained alone."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MOCA_CACHE", str(tmp_path / "cache"))
    folder = str(tmp_path)
    curve, resumed = on_ranks(half_and_whole, 2, folder, start, kind, stage)
    resharded = on_ranks(from_half, 1, folder, start, kind, stage, "resharded")
    alone = TorchEngine(objective(start, kind), settings())
    expected = train(alone, start, range(4))
    alone.save(f"{folder}/alone", {})

    assert resumed == curve[2:]
    for seen in (curve, curve[:2] + resharded):
        torch.testing.assert_close(torch.tensor(seen), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    names = ("alone", "whole", "resumed", "resharded")
    models = {name: written(start, f"{folder}/{name}", kind, tmp_path / f"{name}-out")[0] for name in names}
    before = load_backbone(start).state_dict()
    for name in names[1:]:
        for key, weight in models["alone"].items():
            torch.testing.assert_close(models[name][key], weight, rtol=0, atol=1e-4)
        assert all(torch.equal(before[key], models[name][key]) for key in untrained(start, kind))
    assert all(torch.equal(models["whole"][key], models["resumed"][key]) for key in before)
    files = (tmp_path / "whole" / "zero").iterdir()
    size = sum(file.stat().st_size for file in files if "model_states" in file.name)
    assert kind == "frozen" or size < sum(4 * weight.numel() for weight in before.values()) / 4
