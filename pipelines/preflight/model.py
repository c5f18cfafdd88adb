"""The model of a recipe before any of it is loaded: its sizes, from its settings alone."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import storage
from moca_core.spec import BackboneSpec, read_spec
from pipelines.memory import Weights
from pipelines.recipe import Recipe
from pipelines.runner.plan import Planned

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Model:
    """`of[stage]`: the weights that a rank of the stage holds. `sees[stage]`: whether gradients flow through the vision tower."""

    spec: BackboneSpec
    of: dict[str, Weights]
    sees: dict[str, bool]


def model_of(recipe: Recipe, plan: list[Planned]) -> Model:
    """Of the base model, or of the checkpoint that it will be copied from.

    Raises LookupError where it will be made here and is not yet, and OSError or ValueError where it cannot be read.
    """
    base = next(planned for planned in plan if planned.step.name == "base")
    with _settings(recipe, base) as folder:
        from transformers import AutoConfig

        spec = read_spec(folder, min_image_px=recipe.base.min_image_px, max_image_px=recipe.base.max_image_px)
        config = AutoConfig.from_pretrained(folder)
    stages = {"finetune": recipe.finetune} | ({"pretrain": recipe.pretrain} if recipe.pretrain.steps else {})
    frozen = {name: {"vision", "merger"} <= set(stage.freeze) for name, stage in stages.items()}
    adapted = recipe.finetune.lora.rank and not any(
        target.startswith(("vision", "merger")) for target in recipe.finetune.lora.targets
    )
    sees = {name: not frozen[name] and not (name == "finetune" and adapted) for name in stages}
    return Model(spec, {name: _weights(config, spec, name, stage) for name, stage in stages.items()}, sees)


@contextmanager
def _settings(recipe: Recipe, base: Planned) -> Iterator[str]:
    """A folder with the checkpoint's JSON files: config, tokenizer, image processor."""
    if base.done is None and recipe.base.on_hub():
        from huggingface_hub import snapshot_download

        yield snapshot_download(recipe.base.model, revision=recipe.base.revision, allow_patterns=["*.json"])
        return
    source = storage.join(base.uri, base.done.result["model"]) if base.done else recipe.base.model
    if source is None:
        raise LookupError("the base model is made by this run: its sizes are known after step base")
    with tempfile.TemporaryDirectory() as folder:
        for name, _ in storage.list_files(source):
            if name.endswith(".json") and "/" not in name:
                Path(folder, name).write_bytes(storage.read_bytes(storage.join(source, name)))
        yield folder


def _weights(config: "PreTrainedConfig", spec: BackboneSpec, stage: str, settings: Any) -> Weights:
    """Counted in the objective itself, made without memory."""
    import copy

    import torch
    from transformers import AutoModelForImageTextToText

    from moca_core.lora import add_adapters
    from moca_core.objective.contrastive import Contrastive
    from moca_core.objective.pretraining import MaskedModelling
    from moca_core.parts import freeze

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(copy.deepcopy(config))
        freeze(model, settings.freeze)
        if stage == "finetune":
            if settings.lora.rank:
                add_adapters(model, settings.lora, settings.seed)
            objective: torch.nn.Module = Contrastive(model, spec)
        else:
            objective = MaskedModelling(
                model, spec, mlm_weight=settings.mlm_weight, mae_weight=settings.mae_weight, decoder_layers=settings.decoder_layers
            )  # fmt: skip
    sizes = [(p.numel(), p.requires_grad) for p in objective.parameters()]
    trained = [size for size, is_trained in sizes if is_trained]
    return Weights(total=sum(size for size, _ in sizes), trained=sum(trained), largest=max(trained))
