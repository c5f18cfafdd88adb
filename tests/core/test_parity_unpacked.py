"""Packed training is training on one document after another: losses and every gradient are those of stock transformers."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from moca_core.attention import set_attention
from moca_core.backbone import load_backbone
from moca_core.folder import copy_processor
from moca_core.objective.contrastive import Contrastive
from moca_core.objective.contrastive_config import ContrastiveConfig
from moca_core.objective.pretraining import MaskedModelling
from tests.stock import Documents, Pairs, gradients, noise, one_by_one, pairs_one_by_one

ALL = ("images", "word", "text", "between", "image")
PACKS = {"text": ("text", "word"), "image": ("between",), "images": ("images",), "mixed": ALL}
OPTIONS = {
    "no_shift": {"shift": False},
    "normalised": {"normalise_patches": True},
    "deeper": {"decoder_layers": 2},
    "mlm": {"mae_weight": 0},
    "mae": {"mlm_weight": 0},
    "causal": {"causal": True},
}
LARGE = 1e-3  # what a mistake moves at least


def objective(folder, spec, causal=False, **options):
    model = load_backbone(folder)
    set_attention(model, "causal" if causal else "bidirectional")
    torch.manual_seed(0)
    module = MaskedModelling(model, spec, **options)
    if module.mae_decoder is not None:
        module.mae_decoder.projection.weight.data *= 10  # else its gradients are too small for mistakes to show
    return module


def packed(module, batch):
    """(mean losses, gradients) of one pack."""
    terms = module(batch)
    means = {n: terms[n].sum / max(1, terms[n].count) for n in module.weights}
    sum(module.weights[n] * mean for n, mean in means.items()).backward()
    return {n: mean.item() for n, mean in means.items()}, gradients(module)


def assert_equal(found, expected, scale=1.0):
    assert found[0] == pytest.approx(expected[0], abs=1e-5, rel=0)
    assert found[1].keys() == expected[1].keys()
    for name, grad in found[1].items():
        torch.testing.assert_close(
            grad, expected[1][name], atol=2e-6 * scale, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


def furthest(found, expected):
    """The largest difference between gradients that both have."""
    both = found[1].keys() & expected[1].keys()
    return max((found[1][name] - expected[1][name]).abs().max().item() for name in both)


@pytest.mark.parametrize("names", PACKS.values(), ids=PACKS)
def test_a_pack_trains_as_its_documents_do_one_by_one(any_folder, names):
    documents = Documents(any_folder)
    module = objective(any_folder, documents.spec)
    found, expected = packed(module, documents.batch(*names)), one_by_one(any_folder, module, names)
    assert_equal(found, expected)
    assert expected[0]["mlm"] > 1 and (expected[0]["mae"] > 0.1) == (names != PACKS["text"])
    silent = {n for n, grad in expected[1].items() if not grad.any()}
    seeing = {n for n in expected[1] if n.startswith(("encoder.backbone.visual", "mae_decoder"))}
    assert silent == (seeing if names == PACKS["text"] else set())  # every other weight is compared for something


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_so_it_does_with_every_option(any_folder, options):
    documents = Documents(any_folder)
    module = objective(any_folder, documents.spec, **options)
    found = packed(module, documents.batch(*ALL))
    assert_equal(found, one_by_one(any_folder, module, ALL, **options))
    plain = packed(objective(any_folder, documents.spec), documents.batch(*ALL))
    assert furthest(found, plain) > LARGE  # the option does something


def test_so_it_does_with_a_head_of_its_own(any_folder, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(any_folder)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    untied = AutoModelForImageTextToText.from_config(model.config)
    untied.load_state_dict(model.state_dict() | {"lm_head.weight": 0.1 * torch.randn_like(model.lm_head.weight)})
    untied.save_pretrained(tmp_path)
    copy_processor(any_folder, str(tmp_path))
    documents = Documents(str(tmp_path))
    module = objective(str(tmp_path), documents.spec)
    found = packed(module, documents.batch(*ALL))
    assert "lm_head.weight" in found[1]
    assert_equal(found, one_by_one(str(tmp_path), module, ALL))


def joined(module, batch):
    batch.stream.cu_seqlens = batch.stream.cu_seqlens[[0, -1]]
    batch.noise_seeds = batch.noise_seeds[:1]


def in_a_line(module, batch):
    batch.stream.position_ids[1:] = batch.stream.position_ids[0]


def other_noise(module, batch):
    batch.noise_seeds = batch.noise_seeds[::-1].copy()


def first_layer(module, batch):
    module.mae_decoder.layers[0] = copy.deepcopy(module.encoder.backbone.language_model.layers[0])


def causal(module, batch):
    set_attention(module.encoder.backbone, "causal")


@pytest.mark.parametrize(
    ("mistake", "names"),
    [(joined, PACKS["text"]), (in_a_line, ALL), (other_noise, ALL), (first_layer, ALL), (causal, ALL)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_mistake_would_show(any_folder, mistake, names):
    documents = Documents(any_folder)
    module, batch = objective(any_folder, documents.spec), documents.batch(*names)
    expected = one_by_one(any_folder, module, names)
    mistake(module, batch)
    assert furthest(packed(module, batch), expected) > LARGE


@torch.no_grad()
def test_every_masked_patch_has_noise_of_its_own_in_any_pack(any_folder):
    documents = Documents(any_folder)
    module, seen = objective(any_folder, documents.spec), []
    module.encoder.backbone.visual.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for names in (("images",), ("between",), ALL):
        module(documents.batch(*names))
    batches = [documents.batch(name) for name in ("images", "between")]
    rows = [values[np.repeat(b.masked_groups, 4)] for values, b in zip(seen, batches, strict=False)]
    for values, batch in zip(rows, batches, strict=True):
        torch.testing.assert_close(values, noise(batch.noise_seeds[0], values.shape), atol=0, rtol=0)
    drawn = torch.cat(rows)
    assert drawn.mean().abs() < 0.02 and (drawn.std(dim=1) - 1).abs().max() < 0.1
    alike = torch.corrcoef(drawn) - torch.eye(len(drawn))
    assert len(drawn) > 80 and alike.abs().max() < 0.2  # also of patches in one group, and of different documents
    masked = np.repeat(documents.batch(*ALL).masked_groups, 4)
    assert {row.numpy().tobytes() for row in drawn} < {row.numpy().tobytes() for row in seen[2][masked]}


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_a_batch_of_pairs_trains_as_its_contents_do_one_by_one(any_folder, causal):
    given, temperature = Pairs(any_folder), 0.05
    model = load_backbone(any_folder)
    set_attention(model, "causal" if causal else "bidirectional")
    found = packed(Contrastive(model, given.spec, ContrastiveConfig(temperature=temperature)), given.batch())
    expected = pairs_one_by_one(any_folder, temperature=temperature, causal=causal)
    scale = max(grad.abs().max().item() for grad in expected[1].values())
    assert scale > LARGE
    assert_equal(found, expected, max(1.0, scale))
    assert furthest(found, pairs_one_by_one(any_folder, temperature=temperature, causal=not causal)) > LARGE
