"""However documents fall on packs, micro-batches and ranks, a step of the loop has the gradient of stock transformers over all of them.

Gradients are read off the weights: Adam's first step moves a weight by lr * g / (|g| + eps).
"""

from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from cluster import collectives
from cluster.engine import EngineConfig, open_engine
from cluster.torch_engine import TorchEngine
from moca_core.attention import set_attention
from moca_core.backbone import load_backbone
from moca_core.objective.contrastive import Contrastive, Gather
from moca_core.objective.contrastive_config import ContrastiveConfig
from moca_core.objective.pretraining import MaskedModelling
from moca_core.recompute import set_recompute
from moca_core.spec import read_spec
from pipelines.training.backward import InChunks, whole_batches
from pipelines.training.config import TrainingConfig
from pipelines.training.loop import train
from tests.ranks import on_ranks
from tests.stock import Documents, Pairs, one_by_one, pairs_one_by_one
from tests.tiny import FAMILIES, tiny_model

torch.set_num_threads(1)

BARE = ("bare", "between")  # a pack of which nothing is masked
# the documents of a pack, of every micro-batch, of every rank
LAYOUTS = {
    "whole": [[("images", "word", "text", "between", "image")]],
    "in_two": [[("text", "image", "word"), ("between", "images")]],
    "in_six": [[("image",), ("word",), BARE, ("images",), ("text",), ("between",)]],
    "mixed": [[("images",), ("image", "word")], [("text",), ("between",)]],
    "text": [[("text",), ("word",)], [("word", "text"), ("text",)]],
    "bare": [[("between",), ("images", "text")], [BARE, ("bare", "text")]],
    "nothing": [[BARE, ("bare", "text")]],
    "on_four": [[("images",), BARE], [("word",), ("text",)], [BARE, ("between",)], [("image",), BARE]],
}


@dataclass(frozen=True)
class Case:
    """`layout`: of LAYOUTS, or "pairs" for contrastive fine-tuning, with GradCache for parts of at most so many `tokens`."""

    family: str
    stage: int
    layout: str = "mixed"
    recompute: str = "none"
    tokens: int = 0
    exchange: str = "step"

    def __str__(self):
        return "-".join(map(str, (self.family, self.stage, self.layout, self.recompute, self.tokens, self.exchange)))


QUICK = [
    Case("qwen2_vl", 1),
    Case("qwen2_5_vl", 2),
    *(Case(family, 3) for family in ("qwen2_vl", "qwen2_5_vl")),
    *(Case("qwen3_vl", 3, layout) for layout in ("text", "bare", "pairs")),
    Case("qwen3_vl", 3, recompute="selective"),
    Case("qwen2_5_vl", 0),
    Case("qwen2_5_vl", 2, exchange="micro_batch"),
    *(Case("qwen2_5_vl", stage, "pairs", tokens=30) for stage in (0, 1, 2, 3)),
    Case("qwen2_5_vl", 2, "pairs", tokens=1, exchange="micro_batch"),
]
STAGES = (0, 1, 2, 3)
CHUNKS = [Case("qwen2_5_vl", stage, "pairs", tokens=tokens) for stage in STAGES for tokens in (1, 20, 40, 80, 10_000)]
BY_MICRO_BATCH = [
    Case("qwen3_vl", stage, layout, tokens=tokens, exchange="micro_batch")
    for stage in (2, 3)
    for layout, tokens in (("mixed", 0), ("pairs", 0), ("pairs", 30))
]
SLOW = {
    1: [Case(family, stage, layout) for family in FAMILIES for stage in STAGES for layout in ("in_two", "pairs")]
    + CHUNKS,
    2: [Case(f, stage, layout) for f in FAMILIES for stage in STAGES for layout in ("mixed", "text", "bare", "pairs")]
    + CHUNKS
    + BY_MICRO_BATCH,
    3: [Case(family, stage, "pairs") for family in FAMILIES for stage in STAGES] + CHUNKS,  # 1, 1 and 2 queries
    4: [Case(family, stage, layout) for family in FAMILIES for stage in STAGES for layout in ("on_four", "pairs")]
    + CHUNKS,
}


def objective(folder, layout, recompute="none"):
    model = load_backbone(folder)
    set_attention(model, "bidirectional")
    set_recompute(model, recompute)
    if layout == "pairs":
        gather = Gather(collectives.rank(), collectives.all_gather_with_grad, collectives.all_gather)
        return Contrastive(model, read_spec(folder), ContrastiveConfig(temperature=0.1), gather=gather)
    torch.manual_seed(0)
    module = MaskedModelling(model, read_spec(folder))
    module.mae_decoder.projection.weight.data *= 10  # else its gradients are too small for mistakes to show
    return module


def batches(folder, layout):
    """Of this rank."""
    rank, world = collectives.rank(), collectives.world_size()
    if layout == "pairs":
        return [Pairs(folder).batch(slice(4 * rank // world, 4 * (rank + 1) // world))]
    documents, unmasked = Documents(folder), {"mlm_ratio": 0, "mae_ratio": 0}
    packs = LAYOUTS[layout][rank]
    return [documents.batch(*(n for n in p if n != "bare"), **(unmasked if "bare" in p else {})) for p in packs]


def weights(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def one_step(engine, given, tokens=0):
    """What the loop reports of its only step."""
    reports = []
    train(
        engine,
        engine.module,
        [(0, given)],
        TrainingConfig(steps=1, learning_rate=1.0, decay="none", warmup_fraction=0, max_grad_norm=0),
        sum_over_ranks=collectives.all_reduce_sum,
        after_step=lambda report: reports.append(report.metrics),
        backward_pass=InChunks(tokens, collectives.max_over_ranks) if tokens else whole_batches,
    )
    return reports[0]


def found_of(before, after, **more):
    moved = {name: weight - after[name] for name, weight in before.items()}
    return SimpleNamespace(before=before, gradients={name: u / (1 - u.abs()) for name, u in moved.items()}, **more)


def settings(stage=1, exchange="step"):
    return EngineConfig(zero_stage=stage, gradient_exchange=exchange, eps=1.0)


def under_zero(root, cases):
    return {case: step_under_zero(f"{root}/{case.family}", case) for case in cases}


def step_under_zero(folder, case):
    import deepspeed

    from cluster import deepspeed_engine

    def taken_apart(*args, zero_config=deepspeed_engine.zero_config):
        """Also small weights, which stage 3 would otherwise leave whole on every rank."""
        config = zero_config(*args)
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return config

    module, given = objective(folder, case.layout, case.recompute), batches(folder, case.layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed_engine, "zero_config", taken_apart)
        engine = open_engine(module, settings(case.stage, case.exchange))
    held = sum(parameter.numel() for parameter in module.parameters())
    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        before = weights(module)
    reported = one_step(engine, given, case.tokens)
    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        after = weights(module)
    engine.close()
    return found_of(before, after, reported=reported, held=held)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("parity")
    for family in FAMILIES:
        tiny_model(root / family, family)
    return root


@pytest.fixture(scope="module")
def two_ranks(root):
    return on_ranks(under_zero, 2, str(root), QUICK)


@cache
def expected(folder, layout):
    """(mean losses, gradients) of stock transformers, document by document."""
    if layout == "pairs":
        return pairs_one_by_one(folder, temperature=0.1)
    packs = [pack for rank in LAYOUTS[layout] for pack in rank if "bare" not in pack]
    return one_by_one(folder, objective(folder, layout), [name for pack in packs for name in pack])


def assert_parity(folder, layout, found):
    means, gradients = expected(folder, layout)
    assert {name: found.reported[name] for name in means} == pytest.approx(means, abs=1e-5, rel=0)
    assert found.gradients.keys() == gradients.keys()
    scale = max(1.0, *(grad.abs().max().item() for grad in gradients.values()))
    for name, grad in found.gradients.items():
        torch.testing.assert_close(
            grad, gradients[name], atol=2e-6 * scale, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )
    norm = torch.cat([grad.flatten() for grad in gradients.values()]).norm().item()
    assert found.reported["grad_norm"] == pytest.approx(norm, rel=1e-4)


def in_one_process(folder, layout):
    module, given = objective(folder, layout), batches(folder, layout)
    engine, before = TorchEngine(module, settings()), weights(module)
    return found_of(before, reported=one_step(engine, given), after=weights(module))


@pytest.mark.parametrize("layout", ["whole", "in_two", "in_six"])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_split_into_packs_and_micro_batches_in_one_process(root, family, layout):
    assert_parity(str(root / family), layout, in_one_process(str(root / family), layout))


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_any_split_over_two_ranks(root, two_ranks, case):
    """At stage 3 ranks with text alone, or with nothing masked, keep up with those that have images, and nobody waits for ever."""
    assert_parity(str(root / case.family), case.layout, two_ranks[case])
    assert (two_ranks[case].held == 0) == (case.stage == 3)  # gathered only where they are used


@pytest.mark.slow
@pytest.mark.parametrize("world", SLOW)
def test_any_split_over_more_ranks_and_stages(root, world):
    for case, found in on_ranks(under_zero, world, str(root), SLOW[world]).items():
        assert_parity(str(root / case.family), case.layout, found)


@pytest.mark.parametrize(
    "case", [case for case in QUICK if case.stage == 3 and case.layout in ("mixed", "bare")], ids=str
)
def test_the_decoder_starts_from_the_middle_layer_after_stage_3_took_it_apart(root, two_ranks, case):
    start = two_ranks[case].before
    saved = {n: w for n, w in load_file(root / case.family / "model.safetensors").items() if "visual" not in n}
    decoder = {name.split(".", 3)[3]: w for name, w in start.items() if name.startswith("mae_decoder.layers.0.")}
    assert len(decoder) >= 9
    for name, weight in decoder.items():
        (middle,) = (w for key, w in saved.items() if key.endswith(f"layers.1.{name}"))
        assert torch.equal(weight, middle), name


def test_text_alone_trains_neither_decoder_nor_vision_tower(two_ranks):
    found = two_ranks[Case("qwen3_vl", 3, "text")]
    still = {name for name, grad in found.gradients.items() if not grad.any()}
    assert still == {n for n in found.gradients if n.startswith(("mae_decoder.", "encoder.backbone.visual."))}
    assert found.reported["mae"] == 0 and found.reported["mlm"] > 1


def test_nothing_masked_trains_nothing(root):
    found = in_one_process(str(root / "qwen3_vl"), "nothing")
    assert found.reported["total"] == found.reported["grad_norm"] == 0
    assert not any(grad.any() for grad in found.gradients.values())
