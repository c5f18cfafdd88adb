"""The parts of a vision-language model by name, and freezing them."""

from collections.abc import Collection
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:  # settings name parts, and who reads settings needs no torch
    from torch import nn
    from transformers import PreTrainedModel

Part = Literal["vision", "merger", "language", "embeddings"]
PARTS: tuple[str, ...] = get_args(Part)


def parts_of(model: "PreTrainedModel") -> "dict[str, dict[str, nn.Module]]":
    """{part: its modules by their names in `model`}, of a `ForConditionalGeneration` model; together they hold every weight.

    vision: the tower without what follows it. merger: what makes language states of merged groups of patches, DeepStack's
    mergers too. language: the layers and their norm. embeddings: of tokens, and the language head, tied or not.
    """
    parts: dict[str, dict[str, nn.Module]] = {name: {} for name in PARTS}
    for name, module in model.model.visual.named_children():
        parts["merger" if "merger" in name else "vision"][f"model.visual.{name}"] = module
    for name, module in model.model.language_model.named_children():
        part = "embeddings" if module is model.get_input_embeddings() else "language"
        parts[part][f"model.language_model.{name}"] = module
    parts["embeddings"]["lm_head"] = model.lm_head
    return parts


def freeze(model: "PreTrainedModel", names: Collection[str]) -> None:
    """Keeps these parts as they are, from now on. Before the objective is made, which reads what is trained."""
    require_parts(names)
    for name in names:
        for module in parts_of(model)[name].values():
            module.requires_grad_(False)


def require_parts(names: Collection[str]) -> None:
    """ValueError for a name that is no part, or where all of them would leave nothing to train."""
    if unknown := sorted(set(names) - set(PARTS)):
        raise ValueError(f"freeze: {', '.join(map(repr, unknown))} unknown; the parts are {', '.join(PARTS)}")
    if set(names) == set(PARTS):
        raise ValueError(f"freeze={list(names)} names all parts: nothing of the model would be trained; leave one out")
