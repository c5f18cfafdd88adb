"""LoRA: low-rank adapters on the linear layers of a frozen model (arXiv 2106.09685), by peft."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moca_core.parts import parts_of

if TYPE_CHECKING:  # who reads settings needs no torch
    from peft import LoraConfig
    from torch import Tensor
    from transformers import PreTrainedModel

TARGET_PARTS = ("language", "vision", "merger")


@dataclass(frozen=True)
class Lora:
    """A layer's weight becomes W + alpha / rank * B A, where A and B alone are trained. Rank 0: no adapters.

    `targets` are parts of the model, "language", "vision" or "merger", for all of their linear layers, or those of one name,
    such as "language.q_proj". No dropout: what a step gives would depend on which rank has which row.
    """

    rank: int = 0
    alpha: int = 32
    targets: tuple[str, ...] = ("language",)

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"lora.rank={self.rank} must be positive, or 0 for no adapters")
        if self.alpha <= 0:
            raise ValueError(f"lora.alpha={self.alpha} must be positive")
        wrong = [target for target in self.targets if target.partition(".")[0] not in TARGET_PARTS]
        if wrong or not self.targets:
            raise ValueError(
                f"lora.targets={list(self.targets)} must name {', '.join(TARGET_PARTS)}, or layers such as 'language.q_proj'"
            )

    def identity(self) -> dict[str, Any] | None:
        """Without adapters the other settings change nothing."""
        return asdict(self) if self.rank else None


def add_adapters(model: "PreTrainedModel", lora: Lora, seed: int) -> None:
    """Freezes the model and puts adapters into it, whose sum with it is still the model. Equal for equal seeds.

    Raises ValueError for a target that matches no layer.
    """
    import torch
    from peft import inject_adapter_in_model

    config = _peft_config(model, lora)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)


def merge_adapters(
    model: "PreTrainedModel", lora: Lora, weights: "dict[str, Tensor]", adapter_folder: str, start: str
) -> None:
    """Adds trained adapters to the weights of the model they were trained on, in its precision: float32 is meant.

    `weights` are named as `add_adapters` left them in the model. The adapter itself goes to `adapter_folder` as
    `peft.PeftModel.from_pretrained` reads it; `start` is what its config calls the model that it belongs to.
    """
    from peft import get_peft_model

    adapted = get_peft_model(model, _peft_config(model, lora), autocast_adapter_dtype=False)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if trained != weights.keys():
        raise ValueError(
            f"these weights are not those of {lora}: missing {sorted(trained - weights.keys())[:5]}, "
            f"unknown {sorted(weights.keys() - trained)[:5]}"
        )
    model.load_state_dict(weights, strict=False)
    adapted.peft_config["default"].base_model_name_or_path = start
    # False: else it asks the Hub whether the model got new tokens
    adapted.save_pretrained(adapter_folder, save_embedding_layers=False)
    (Path(adapter_folder) / "README.md").unlink()  # a form to fill in
    adapted.merge_and_unload(safe_merge=True)


def target_layers(model: "PreTrainedModel", targets: tuple[str, ...]) -> list[str]:
    """Names of the linear layers that `targets` mean in this very model. ValueError for one that means none."""
    from torch import nn

    chosen = []
    for target in targets:
        part, _, wanted = target.partition(".")
        layers = [
            f"{top}.{name}" if name else top
            for top, module in parts_of(model)[part].items()
            for name, layer in module.named_modules()
            if isinstance(layer, nn.Linear)
        ]
        found = [layer for layer in layers if wanted in ("", _last(layer))]
        if not found:
            raise ValueError(
                f"lora.targets: {target!r} matches no linear layer; those of {part} are {', '.join(sorted(set(map(_last, layers))))}"
            )
        chosen += found
    return chosen


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _peft_config(model: "PreTrainedModel", lora: Lora) -> "LoraConfig":
    from peft import LoraConfig

    return LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=target_layers(model, lora.targets))
