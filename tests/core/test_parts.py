"""Frozen parts: every weight belongs to one, only what is named stays, and what is frozen costs no memory."""

from itertools import combinations

import pytest
import torch
from samples import CONTENTS, row_of
from torch.multiprocessing.reductions import StorageWeakRef

from moca_core.backbone import load_backbone
from moca_core.data.masking import mask
from moca_core.data.render import Renderer
from moca_core.objective.pretraining import MaskedModelling
from moca_core.parts import PARTS, freeze, parts_of
from moca_core.recompute import set_recompute
from moca_core.spec import read_spec


def part_by_name(name):
    """The part of a weight, from the names that the families give."""
    if name.startswith("model.visual."):
        return "merger" if "merger" in name.split(".")[2] else "vision"
    return "embeddings" if "embed_tokens" in name or name.startswith("lm_head") else "language"


def test_every_weight_is_in_one_part(any_folder):
    model = load_backbone(any_folder)
    placed = {
        f"{top}.{name}": part
        for part, modules in parts_of(model).items()
        for top, module in modules.items()
        for name, _ in module.named_parameters()
    }
    assert placed == {name: part_by_name(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    assert set(placed.values()) == set(PARTS)


@pytest.mark.parametrize("names", [names for count in range(4) for names in combinations(PARTS, count)])
def test_what_is_named_is_frozen_and_nothing_else(any_folder, names):
    model = load_backbone(any_folder)
    freeze(model, names)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if part_by_name(name) not in names}


def test_a_head_of_its_own_is_frozen_with_the_embedding(folder):
    model = load_backbone(folder)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.data.clone())
    freeze(model, ("embeddings",))
    assert not model.lm_head.weight.requires_grad and not model.get_input_embeddings().weight.requires_grad


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("visual",), "freeze: 'visual' unknown; the parts are vision, merger, language, embeddings"),
        (PARTS, "names all parts: nothing of the model would be trained"),
    ],
)
def test_unknown_parts_and_all_of_them_are_refused(folder, names, message):
    with pytest.raises(ValueError, match=message):
        freeze(load_backbone(folder), names)


def objective(folder, names, recompute="none"):
    model = load_backbone(folder)
    freeze(model, names)
    set_recompute(model, recompute)
    return MaskedModelling(model, read_spec(folder)).train()


def batch_of(folder, tokenizer):
    spec = read_spec(folder)
    return mask(row_of(CONTENTS, Renderer(tokenizer, spec, 256)), spec, seed=0, epoch=0, mlm_ratio=0.4, mae_ratio=0.5)


def test_the_decoder_is_trained_where_the_tower_it_comes_from_is_frozen(any_folder, tokenizer):
    module = objective(any_folder, ("vision", "language", "embeddings"))
    terms = module(batch_of(any_folder, tokenizer))
    (terms["mlm"].sum + terms["mae"].sum).backward()
    for name, parameter in module.named_parameters():
        wanted = "mae_decoder" in name or "merger" in name
        assert (parameter.grad is not None) == parameter.requires_grad == wanted, name
        assert not wanted or parameter.grad.isfinite().all(), name


def kept_by(module, within, batch):
    """How many tensors autograd saved while `within` ran are still there after the forward pass."""
    saved, inside = [], []

    def pack(tensor):
        if inside:
            saved.append(StorageWeakRef(tensor.untyped_storage()))
        return tensor

    hooks = [
        within.register_forward_pre_hook(lambda *_: inside.append(True)),
        within.register_forward_hook(lambda *_: inside.clear()),
    ]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        terms = module(batch)
    kept = sum(not reference.expired() for reference in saved)
    for hook in hooks:
        hook.remove()
    assert terms["mlm"].sum.requires_grad
    return kept


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_frozen_vision_tower_keeps_no_activations(any_folder, tokenizer, recompute):
    batch = batch_of(any_folder, tokenizer)

    def kept(names):
        module = objective(any_folder, names, recompute)
        visual = module.encoder.backbone.visual
        return tuple(kept_by(module, within, batch) for within in (visual, visual.blocks[0]))

    assert kept(("vision", "merger")) == (0, 0)
    whole, block = kept(("vision",))
    assert whole > 0 and block == 0
    assert min(kept(())) > 0
    assert min(kept(("merger",))) > 0
