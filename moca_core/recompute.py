"""Activation checkpointing: what a layer's forward keeps for its backward, and what is computed again instead.

Changes memory and time, never a gradient. "none" keeps all; "selective" keeps what is dear to compute, the products of matrices
and attention, and computes the norms, rotations and activations between them again; "full" keeps the input of every layer alone and
computes the whole forward again: a third more work.
"""

from functools import partial
from typing import Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

Recompute = Literal["none", "selective", "full"]

_aten = torch.ops.aten
_DEAR = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}
_DEAR_NAMES = ("torch_attn::_varlen_attn",)  # registered when torch.nn.attention.varlen is first imported


def set_recompute(model: PreTrainedModel, kind: Recompute) -> None:
    """Sets it for every layer of both towers. A model in eval mode keeps everything whatever is set: engines train in train mode.

    By the layers' own switches: the model's `activation_checkpointing_enable` also makes frozen embeddings ask for gradients.
    """
    settings: dict = {"use_reentrant": False}
    if kind == "selective":
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for layer in (*model.model.visual.blocks, *model.model.language_model.layers):
        layer.gradient_checkpointing = kind != "none"
        layer._gradient_checkpointing_func = partial(checkpoint, **settings)


def _policy(context, op, *args, **kwargs) -> CheckpointPolicy:
    dear = op in _DEAR or op.name().removesuffix(".default") in _DEAR_NAMES
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE
