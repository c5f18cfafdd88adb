"""Layers compiled by torch.compile: norms, rotations and activations in one kernel each instead of five to ten.

Attention stays the kernel that it is, between two compiled halves of a layer. What a compiled layer keeps for its backward pass is
chosen by the compiler, about what "selective" of recompute.py keeps, so the two exclude each other. Worth its minutes of compiling
on a GPU; on two CPU cores it gained a tenth (docs/log.md).
"""

from transformers import PreTrainedModel


def compile_layers(model: PreTrainedModel) -> None:
    """Compiles every layer of both towers at its first call, for packs of any length."""
    for layer in (*model.model.visual.blocks, *model.model.language_model.layers):
        layer.compile(dynamic=True)
