"""Families of vision-language models: one file for what each does in its own way, one code path for everything else.

What all of them share, and the code relies on: `model.visual` (patch_embed.proj, blocks, merger), `model.language_model`
(embed_tokens, layers, norm, rotary_emb), mRoPE positions as in Qwen2-VL, one placeholder token per merged group of patches.
`docs/your_own_model.md` says what a new one needs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moca_core.family import qwen2_5_vl, qwen2_vl, qwen3_vl

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Family:
    """What differs between families.

    `vision_sizes`: vision config to the vision fields of BackboneSpec. `vision_inputs`: grids [N, 3] int64 on the CPU and the
    spec to the keyword arguments that spare the tower from working them out (and waiting for the device) in its forward.
    `tiny_vision`: TinyConfig (bootstrap.py) to the settings of a vision config of that size. ValueError for sizes that it cannot have.
    """

    vision_sizes: Callable[[Any], dict[str, int]]
    tiny_vision: Callable[[Any], dict[str, Any]]
    vision_inputs: Callable[["torch.Tensor", Any], dict[str, "torch.Tensor | int"]]


FAMILIES = {
    name: Family(module.vision_sizes, module.tiny_vision, module.vision_inputs)
    for name, module in (("qwen2_vl", qwen2_vl), ("qwen2_5_vl", qwen2_5_vl), ("qwen3_vl", qwen3_vl))
}


def family_of(model_type: str) -> Family:
    """Raises ValueError for a model type that no file here describes."""
    if model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not supported; use one of {', '.join(FAMILIES)}")
    return FAMILIES[model_type]
