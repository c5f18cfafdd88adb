"""Loading is strict; what the spec says of a checkpoint is what the checkpoint is."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import ModuleList
from transformers import AutoModelForImageTextToText, AutoTokenizer

from moca_core.attention import IMPLEMENTATION, set_attention
from moca_core.backbone import load_backbone, save_backbone, trained_weights
from moca_core.bootstrap import TinyConfig, create, describe
from moca_core.data.render import load_tokenizer
from moca_core.folder import copy_processor
from moca_core.objective.pretraining import MaskedModelling
from moca_core.spec import BackboneSpec, read_spec
from tests.tiny import FAMILIES


def change_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def key_with(weights, part):
    return next(k for k in weights if part in k)


PARTS = (
    "layers.1.mlp.up_proj",
    "layers.2.self_attn.k_proj",
    "layers.0.input_layernorm",
    "embed_tokens",
    "visual.patch_embed",
    "visual.blocks.1.attn.qkv.bias",
    "visual.merger",
)
PARTS_OF = {"qwen3_vl": (*PARTS, "q_norm", "visual.pos_embed", "visual.deepstack_merger_list.0")}


@pytest.mark.parametrize(("family", "part"), [(f, part) for f in FAMILIES for part in PARTS_OF.get(f, PARTS)])
def test_a_missing_weight_or_one_of_another_shape_is_refused_by_name(folders, tmp_path, family, part):
    shutil.copytree(folders[family], tmp_path / "model")

    def shorten(weights):
        key = key_with(weights, part)
        weights[key] = weights[key][:-1].contiguous()

    for change, refusal in ((shorten, "of another shape"), (lambda w: w.pop(key_with(w, part)), "missing")):
        change_weights(tmp_path / "model", change)
        with pytest.raises(ValueError, match=f"does not fit .*{refusal} [^,]*{part}"):
            load_backbone(str(tmp_path / "model"))


@pytest.mark.parametrize("stranger", ["stranger.weight", "layers.3.mlp.up_proj.weight"])
def test_a_weight_too_many_is_refused_by_name(any_folder_copy, stranger):
    change_weights(
        any_folder_copy, lambda weights: weights.update({f"model.language_model.{stranger}": torch.zeros(2)})
    )
    with pytest.raises(ValueError, match=f"unexpected .*{stranger}"):
        load_backbone(str(any_folder_copy))


def test_a_loaded_model_is_what_transformers_loads_and_saves_back_equal(any_folder, tmp_path):
    model = load_backbone(any_folder)
    expected = AutoModelForImageTextToText.from_pretrained(any_folder).state_dict()
    save_backbone(model, str(tmp_path))
    again = load_backbone(str(tmp_path))
    for name, weight in expected.items():
        assert torch.equal(model.state_dict()[name], weight) and torch.equal(again.state_dict()[name], weight)
    saved = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in saved  # tied: written once
    published = "model.visual.", "model.language_model.layers."  # the layouts of the published checkpoints
    if model.config.model_type != "qwen3_vl":
        published = "visual.", "model.layers."
    assert all(any(name.startswith(prefix) for name in saved) for prefix in published)
    assert IMPLEMENTATION not in (tmp_path / "config.json").read_text()


def test_an_untied_head_is_kept_and_one_that_is_gone_starts_from_the_embedding(folder_copy, tmp_path):
    config = json.loads((folder_copy / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    (folder_copy / "config.json").write_text(json.dumps(config))
    headless = load_backbone(str(folder_copy))
    embedding = headless.get_input_embeddings().weight
    assert torch.equal(headless.lm_head.weight, embedding) and headless.lm_head.weight is not embedding
    headless.lm_head.weight.data.add_(1)
    save_backbone(headless, str(tmp_path / "out"))
    assert torch.equal(load_backbone(str(tmp_path / "out")).lm_head.weight, embedding + 1)


def test_trained_weights_go_back_under_their_names(folder, spec, tmp_path):
    model = load_backbone(folder)
    module = MaskedModelling(model, spec)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5)
    save_backbone(load_backbone(folder), str(tmp_path), trained_weights(module.state_dict()))
    before, after = load_backbone(folder).state_dict(), load_backbone(str(tmp_path)).state_dict()
    assert before.keys() == after.keys()
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight + 0.5)


def test_loading_in_half_precision(folder):
    assert {p.dtype for p in load_backbone(folder, torch.bfloat16).parameters()} == {torch.bfloat16}


def test_conversion_writes_both_flags(folder, tmp_path):
    model = load_backbone(folder)
    set_attention(model, "bidirectional")
    save_backbone(model, str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["is_causal"] is False and config["text_config"]["is_causal"] is False


def test_the_spec_is_that_of_the_checkpoint(any_folder):
    spec = read_spec(any_folder)
    tokenizer = AutoTokenizer.from_pretrained(any_folder)
    model = AutoModelForImageTextToText.from_pretrained(any_folder)
    ids = dict(
        image_token_id="<|image_pad|>",
        vision_start_token_id="<|vision_start|>",
        vision_end_token_id="<|vision_end|>",
        mask_token_id="<|mask|>",
    )
    for field, token in ids.items():
        assert getattr(spec, field) == tokenizer.convert_tokens_to_ids(token)
    assert set(spec.special_token_ids) == set(tokenizer.all_special_ids)
    assert spec.vocab_size == model.get_input_embeddings().weight.shape[0] >= len(tokenizer)
    assert (spec.text_hidden, spec.text_layers) == (32, 3)
    assert (spec.min_image_px, spec.max_image_px) == (56 * 56, 196 * 196)

    def matrices(module):
        return sum(p.numel() for p in module.parameters() if p.dim() > 1)

    assert spec.text_params_per_layer == matrices(model.model.language_model.layers[0])
    assert spec.vision_params_per_layer == matrices(model.model.visual.blocks[0])
    assert spec.vision_layers == len(model.model.visual.blocks) == 2
    visual = model.model.visual
    assert spec.merger_params == matrices(visual.merger) + matrices(
        getattr(visual, "deepstack_merger_list", ModuleList())
    )
    assert BackboneSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_bounds_may_be_narrowed(folder):
    narrow = read_spec(folder, min_image_px=4000, max_image_px=9000)
    assert (narrow.min_image_px, narrow.max_image_px) == (4000, 9000)


@pytest.mark.parametrize(
    ("least", "most"),
    [(9000, 4000), (None, 3135), (196 * 196 + 1, None), (783, None), (783, 783), (0, None), (None, 0)],
)
def test_bounds_that_no_image_can_keep_are_refused(folder, least, most):
    """The checkpoint's own are 3136 and 38416, and one token is 784 pixels: also where one of the two is set alone."""
    shown = f"min_image_px={3136 if least is None else least} to max_image_px={196 * 196 if most is None else most}"
    with pytest.raises(ValueError, match=f"{shown}: the least must be 784 .*; set both"):
        read_spec(folder, min_image_px=least, max_image_px=most)
    assert read_spec(folder, min_image_px=784, max_image_px=784).max_image_tokens >= 1


def test_a_tiny_model_s_bounds_are_checked_before_it_is_made():
    with pytest.raises(ValueError, match="min_image_px=3136 is above max_image_px=2000: set both"):
        TinyConfig(max_image_px=2000)


def edit_tokenizer(folder, change):
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    change(tokenizer)
    path.write_text(json.dumps(tokenizer))


def without_mask(tokenizer):
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] != "<|mask|>"]


def specials_first(tokenizer):
    """As in tokenizers that were extended behind their special tokens."""
    without_mask(tokenizer)
    for token in tokenizer["added_tokens"]:
        token["id"] -= 392
    names = {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    tokenizer["model"]["vocab"] = names | {t: i + 7 for t, i in tokenizer["model"]["vocab"].items()}


@pytest.mark.parametrize("change", [without_mask, specials_first])
def test_without_a_mask_token_it_gets_a_row_that_no_token_uses(folder_copy, change):
    edit_tokenizer(folder_copy, change)
    found = read_spec(str(folder_copy))
    used = set(load_tokenizer(f"{folder_copy}/tokenizer.json").get_vocab(with_added_tokens=True).values())
    assert used == set(range(399))
    assert found.mask_token_id not in used and found.mask_token_id < found.vocab_size
    assert found.mask_token_id in found.special_token_ids


def test_no_free_row_is_refused(folder_copy):
    def rename_mask(tokenizer):
        for token in tokenizer["added_tokens"]:
            token["content"] = token["content"].replace("<|mask|>", "<|other|>")

    edit_tokenizer(folder_copy, rename_mask)
    with pytest.raises(ValueError, match=r"none is free for <\|mask\|>"):
        read_spec(str(folder_copy))


def test_unknown_models_and_missing_processors_are_refused(folder_copy):
    (folder_copy / "preprocessor_config.json").rename(folder_copy / "processor_config.json")
    assert read_spec(str(folder_copy)).max_image_px == 196 * 196
    (folder_copy / "processor_config.json").unlink()
    with pytest.raises(ValueError, match=r"no preprocessor_config\.json"):
        read_spec(str(folder_copy))
    (folder_copy / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="'llama' is not supported; use one of qwen2_vl, qwen2_5_vl"):
        read_spec(str(folder_copy))


def test_processor_settings_of_all_layouts(folder_copy, spec):
    path = folder_copy / "preprocessor_config.json"
    values = json.loads(path.read_text())
    size = values.pop("size")
    path.write_text(json.dumps(values | {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}))
    assert read_spec(str(folder_copy)) == spec
    path.unlink()
    nested = {"image_processor": values | {"size": size}, "processor_class": "X"}
    (folder_copy / "processor_config.json").write_text(json.dumps(nested))
    assert read_spec(str(folder_copy)) == spec


def test_bootstrap_is_the_same_from_the_same_seed(tmp_path):
    text = dict(text_hidden=32, text_layers=1, text_heads=2, text_kv_heads=1, text_intermediate=32)
    vision = dict(vision_hidden=32, vision_layers=1, vision_heads=2, vision_intermediate=32)
    sizes = TinyConfig(vocab_size=320, **text, **vision)
    state = torch.get_rng_state()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        create(str(tmp_path / name), ["some text to learn from " * 20], sizes, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    first, same, other = (load_file(tmp_path / n / "model.safetensors") for n in "abc")
    assert all(torch.equal(first[k], same[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)
    read = [(tmp_path / n / "tokenizer.json").read_bytes() for n in "ab"]
    assert read[0] == read[1]


@pytest.mark.parametrize(
    "wrong", [{"text_hidden": 100}, {"text_heads": 16}, {"vision_hidden": 60}, {"vision_heads": 12}]
)
def test_sizes_that_rope_cannot_split_are_refused(wrong):
    with pytest.raises(ValueError, match="multiple of 8 and at least 16"):
        TinyConfig(**wrong)


@pytest.mark.parametrize(("inner", "such_as"), [(256, "192 or 288"), (64, "96"), (200, "192 or 288")])
def test_inner_sizes_that_a_family_s_config_cannot_say_are_refused(inner, such_as):
    with pytest.raises(
        ValueError, match=f"vision_intermediate={inner} must be a multiple of vision_hidden=96 .* {such_as}$"
    ):
        TinyConfig(family="qwen2_vl", vision_intermediate=inner)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_model_has_the_inner_size_that_was_asked_for(tmp_path, family):
    describe(str(tmp_path), ["some text to learn from " * 20], TinyConfig(family=family, vision_intermediate=288))
    matrices = {"qwen2_5_vl": 3, "qwen2_vl": 2, "qwen3_vl": 2}[family]
    assert read_spec(str(tmp_path)).vision_params_per_layer == 4 * 96**2 + matrices * 96 * 288


def test_processor_files_are_copied_and_weights_are_not(folder, tmp_path):
    copy_processor(folder, str(tmp_path))
    names = {p.name for p in tmp_path.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"} <= names
    assert not {"model.safetensors", "config.json"} & names


def test_the_guide_shows_a_whole_family():
    root = Path(__file__).parents[2]
    (shown,) = re.findall(r"```python\n(.*?)```", (root / "docs" / "your_own_model.md").read_text(), re.DOTALL)
    assert shown == (root / "moca_core" / "family" / "qwen2_5_vl.py").read_text()
