"""LoRA: adapters start as nothing, get the gradients of a product of two matrices, and merge into the model they make."""

import ast
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from samples import image, text, words

import moca_core.lora
from moca_core.attention import set_attention
from moca_core.backbone import load_backbone, save_backbone, trained_weights
from moca_core.data.pairs import collate_pairs
from moca_core.data.render import Renderer
from moca_core.lora import Lora, add_adapters, merge_adapters, target_layers
from moca_core.model.inputs import to_device
from moca_core.objective.contrastive import Contrastive
from moca_core.recompute import set_recompute
from moca_core.spec import read_spec
from moca_core.types import Pair

EVERYWHERE = Lora(rank=3, alpha=6, targets=("language", "vision", "merger"))
SOME = Lora(rank=2, alpha=8, targets=("language.q_proj", "vision.qkv"))
PAIRS = [
    Pair("t", (text(words(6, n)), image(60, 60, n)), ((text(words(7, n + 9)),),), ((text(words(5, n + 20)),),))
    for n in range(3)
]


def adapted(folder, lora, seed=0):
    model = load_backbone(folder)
    add_adapters(model, lora, seed)
    return model


def enliven(model):
    """Adapters that do something, as after training."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=generator)


def adapters(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def objective(model, folder):
    set_attention(model, "bidirectional")
    return Contrastive(model, read_spec(folder))


def batch_of(folder, tokenizer):
    return collate_pairs(PAIRS, Renderer(tokenizer, read_spec(folder), 256), num_negatives=1, sources=["t"], key=(0,))


@torch.no_grad()
def embeddings(model, folder, tokenizer):
    module = objective(model, folder).eval()
    stream = batch_of(folder, tokenizer).stream
    return module.encoder.embed(to_device(stream, module.spec, torch.device("cpu")))


@pytest.mark.parametrize("lora", [EVERYWHERE, SOME])
def test_adapters_start_as_nothing_and_are_all_that_is_trained(any_folder, tokenizer, lora):
    plain, model = load_backbone(any_folder), adapted(any_folder, lora)
    assert torch.equal(embeddings(plain, any_folder, tokenizer), embeddings(model, any_folder, tokenizer))
    layers = target_layers(plain, lora.targets)
    expected = {f"{layer}.lora_{side}.default.weight" for layer in layers for side in "AB"}
    assert adapters(model).keys() == expected
    for name, parameter in adapters(model).items():
        assert lora.rank in parameter.shape, name


def test_targets_are_the_linear_layers_of_the_model_at_hand(any_folder):
    model = load_backbone(any_folder)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    everywhere = target_layers(model, EVERYWHERE.targets)
    assert set(everywhere) == linear and len(everywhere) == len(linear)
    language = target_layers(model, Lora().targets)
    assert {name.split(".")[-1] for name in language} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert len(language) == 7 * 3
    assert target_layers(model, ("vision.qkv",)) == [f"model.visual.blocks.{n}.attn.qkv" for n in range(2)]


def test_adapters_are_equal_for_equal_seeds(folder):
    torch.manual_seed(1)
    first, state = adapters(adapted(folder, SOME, 7)), torch.get_rng_state()
    torch.manual_seed(2)
    second, other = adapters(adapted(folder, SOME, 7)), adapters(adapted(folder, SOME, 8))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "lora_A" in name)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def merged(folder, lora, model, to):
    """The start model with the adapters of `model` merged, and the folder of the adapter."""
    start = load_backbone(folder)
    merge_adapters(start, lora, {n: p.detach().clone() for n, p in adapters(model).items()}, str(to), "runs/start")
    return start


@pytest.mark.parametrize("lora", [EVERYWHERE, SOME])
def test_the_merged_model_and_the_saved_adapter_are_the_adapted_model(any_folder, tokenizer, tmp_path, lora):
    model = adapted(any_folder, lora)
    enliven(model)
    expected = embeddings(model, any_folder, tokenizer)
    assert (expected - embeddings(load_backbone(any_folder), any_folder, tokenizer)).abs().max() > 0.01
    one = merged(any_folder, lora, model, tmp_path / "adapter")
    torch.testing.assert_close(embeddings(one, any_folder, tokenizer), expected, rtol=0, atol=1e-5)

    save_backbone(one, str(tmp_path / "model"))
    before, after = load_backbone(any_folder).state_dict(), load_backbone(str(tmp_path / "model")).state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{layer}.weight" for layer in target_layers(load_backbone(any_folder), lora.targets)}

    read = PeftModel.from_pretrained(load_backbone(any_folder), tmp_path / "adapter").base_model.model
    torch.testing.assert_close(embeddings(read, any_folder, tokenizer), expected, rtol=0, atol=1e-6)
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (lora.rank, lora.alpha, "LORA")
    assert config["base_model_name_or_path"] == "runs/start"


def test_gradients_are_those_of_the_product_of_two_matrices(any_folder, tokenizer, tmp_path):
    """With G the gradient of W + s B A as one matrix: s G Aᵀ for B and s Bᵀ G for A; also where activations are recomputed."""
    model = adapted(any_folder, EVERYWHERE)
    enliven(model)
    whole = merged(any_folder, EVERYWHERE, model, tmp_path).requires_grad_(True)
    set_recompute(model, "full")
    batch = batch_of(any_folder, tokenizer)
    for one in (model, whole):
        objective(one, any_folder).train()(batch)["contrastive"].sum.backward()
    scale = EVERYWHERE.alpha / EVERYWHERE.rank
    low_rank = dict(model.named_parameters())
    for layer in target_layers(load_backbone(any_folder), EVERYWHERE.targets):
        gradient = whole.get_parameter(f"{layer}.weight").grad
        a, b = (low_rank[f"{layer}.lora_{side}.default.weight"] for side in "AB")
        assert gradient.abs().max() > 1e-5, layer
        tolerance = {"rtol": 1e-3, "atol": 1e-5 * gradient.abs().max().item()}
        torch.testing.assert_close(b.grad, scale * gradient @ a.T, **tolerance)
        torch.testing.assert_close(a.grad, scale * b.T @ gradient, **tolerance)
    assert all(p.grad is None for name, p in low_rank.items() if "lora_" not in name)


def test_weights_of_other_adapters_are_refused(folder, tmp_path):
    model = adapted(folder, SOME)
    weights = {n: p.detach() for n, p in adapters(model).items()}
    with pytest.raises(ValueError, match=r"missing .*mlp.down_proj.lora_A"):
        merge_adapters(load_backbone(folder), EVERYWHERE, weights, str(tmp_path), "start")
    state = objective(load_backbone(folder), folder).state_dict() | objective(model, folder).state_dict()
    with pytest.raises(ValueError, match=r"unknown .*embed_tokens"):
        merge_adapters(load_backbone(folder), SOME, trained_weights(state), str(tmp_path), "start")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": -1}, "lora.rank=-1 must be positive, or 0"),
        ({"alpha": 0}, "lora.alpha=0 must be positive"),
        ({"targets": ()}, r"lora.targets=\[\] must name language, vision, merger"),
        ({"targets": ("q_proj",)}, r"lora.targets=\['q_proj'\] must name language"),
        ({"targets": ("embeddings",)}, "must name language, vision, merger, or layers such as 'language.q_proj'"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Lora(**settings)


def test_a_target_that_matches_nothing_is_refused_by_what_there_is(folder):
    with pytest.raises(ValueError, match=r"'vision.q_proj' matches no linear layer; those of vision are .*, qkv"):
        add_adapters(load_backbone(folder), Lora(rank=2, targets=("language", "vision.q_proj")), 0)


def test_settings_of_no_adapter_are_all_the_same():
    assert Lora(alpha=1).identity() == Lora().identity() != Lora(rank=1).identity()


def test_peft_waits_for_its_use():
    """Who trains without adapters needs no peft: no module of the package imports it at its top."""
    package = Path(moca_core.lora.__file__).parent
    tops = [node for path in package.rglob("*.py") for node in ast.parse(path.read_text()).body]
    assert not [ast.unparse(n) for n in tops if isinstance(n, ast.Import | ast.ImportFrom) and "peft" in ast.unparse(n)]
