"""What a stage writes after training with frozen parts or adapters: the start model, where nothing was trained to the bit."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
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
from moca_core.parts import freeze, parts_of
from moca_core.spec import read_spec
from moca_core.types import Pair
from pipelines.training.stage import write_model
from tests.core.samples import image, text, words
from tests.tiny import tiny_model

LORA = Lora(rank=2, alpha=4, targets=("language", "vision.qkv"))
FROZEN = ("vision", "embeddings")
STAGES = (1, 2, 3)
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
    return Contrastive(model, read_spec(start), temperature=0.5, gather=gather)


def train(engine: Engine, start: str, steps: range) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step."""
    share = len(PAIRS) // engine.world_size
    renderer = Renderer(load_tokenizer(f"{start}/tokenizer.json"), read_spec(start), 256)
    mine = PAIRS[engine.rank * share : (engine.rank + 1) * share]
    batch = collate_pairs(mine, renderer, num_negatives=0, key=(0,))
    seen = []
    for step in steps:
        loss = engine.forward(batch)["contrastive"].sum / len(PAIRS)
        engine.backward(loss)
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


def rank_main(index: int, world: int, folder: str, start: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(index), LOCAL_RANK=str(index), WORLD_SIZE=str(world))
    torch.distributed.init_process_group("gloo", f"file://{folder}/group{world}", rank=index, world_size=world)
    found = {}
    for kind in ("frozen", "lora"):
        for stage in STAGES:
            engine = DeepSpeedEngine(objective(start, kind), settings(stage))
            half, whole = f"{folder}/{kind}{stage}-half", f"{folder}/{kind}{stage}"
            if world == 2:
                curve = train(engine, start, range(2))
                engine.save(half, {"step": 2})
                found[kind, stage] = curve + train(engine, start, range(2, 4))
                engine.save(whole, {"step": 4})
                engine.close()
                engine = DeepSpeedEngine(objective(start, kind), settings(stage))
            assert engine.load(half) == {"step": 2}
            found[kind, stage, "resumed"] = train(engine, start, range(2, 4))
            engine.save(f"{whole}-resumed{world}", {"step": 4})
            engine.close()
    if index == 0:
        torch.save(found, f"{folder}/found{world}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads may abort an ordinary exit


@pytest.mark.slow
def test_frozen_parts_and_adapters_on_two_ranks_at_every_zero_stage(
    start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal to one process, resumed to the bit, taken up by one rank, and written."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MOCA_CACHE", str(tmp_path / "cache"))
    for world in (2, 1):
        mp.spawn(rank_main, (world, str(tmp_path), start), nprocs=world)
    found, resharded = (torch.load(tmp_path / f"found{world}.pt", weights_only=False) for world in (2, 1))
    for kind in ("frozen", "lora"):
        alone = TorchEngine(objective(start, kind), settings())
        curve = train(alone, start, range(4))
        alone.save(str(tmp_path / f"{kind}-alone"), {})
        expected, _ = written(start, str(tmp_path / f"{kind}-alone"), kind, tmp_path / f"{kind}-alone-out")
        before = load_backbone(start).state_dict()
        for stage in STAGES:
            assert found[kind, stage, "resumed"] == found[kind, stage][2:]
            for seen in (found[kind, stage], found[kind, stage][:2] + resharded[kind, stage, "resumed"]):
                torch.testing.assert_close(torch.tensor(seen), torch.tensor(curve), rtol=1e-4, atol=1e-5)
            models = {}
            for checkpoint in (f"{kind}{stage}", f"{kind}{stage}-resumed2", f"{kind}{stage}-resumed1"):
                models[checkpoint], _ = written(start, str(tmp_path / checkpoint), kind, tmp_path / f"{checkpoint}-out")
                for name, weight in expected.items():
                    torch.testing.assert_close(models[checkpoint][name], weight, rtol=0, atol=1e-4)
                assert all(torch.equal(before[n], models[checkpoint][n]) for n in untrained(start, kind))
            whole, again = models[f"{kind}{stage}"], models[f"{kind}{stage}-resumed2"]
            assert all(torch.equal(whole[name], again[name]) for name in whole)
            files = (tmp_path / f"{kind}{stage}" / "zero").iterdir()
            size = sum(file.stat().st_size for file in files if "model_states" in file.name)
            model_bytes = 4 * sum(weight.numel() for weight in before.values())
            assert kind == "frozen" or size < model_bytes / 4  # what is frozen is not in a checkpoint
