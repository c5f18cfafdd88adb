"""FLOPs counted from a model's sizes and a real batch: what balances packs, and what MFU is measured by.

Two per weight and token forward, two more for the gradient of the weights, two more for that of the inputs; attention within
sequences, images and windows only. Norms, activations and biases are left out, as in the usual definition of MFU (PaLM, arXiv
2204.02311, appendix B). What activation checkpointing computes again is not counted: it is no progress.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from moca_core.spec import BackboneSpec

Grid = Sequence[int]
"""(time, height, width) of an image in patches."""


class Flops(NamedTuple):
    """Forward FLOPs of a part of the model: products with weights, those of activations in attention, and products of weights with
    what never needs a gradient (pixels)."""

    linear: float
    attention: float = 0.0
    pixels: float = 0.0

    def trained(self, *, weights: float = 1, inputs: bool = True) -> float:
        """Forward and backward FLOPs, where this share of the weights is trained and the inputs need a gradient or not."""
        linear = self.linear * (1 + weights + inputs) + self.pixels * (1 + weights)
        return linear + self.attention * (3 if weights or inputs else 1)


def language_flops(spec: "BackboneSpec", lengths: Iterable[int]) -> Flops:
    """The language tower over packed sequences of these lengths (tokens)."""
    lengths = [int(n) for n in lengths]
    pairs = sum(n * n for n in lengths)
    linear = 2.0 * sum(lengths) * spec.text_layers * spec.text_params_per_layer
    return Flops(linear, 4.0 * spec.text_layers * spec.text_width * pairs)


def vision_flops(spec: "BackboneSpec", grids: Iterable[Grid]) -> Flops:
    """The vision tower with its mergers over images of these grids (patches)."""
    grids = [tuple(int(n) for n in grid) for grid in grids]
    patches = sum(time * height * width for time, height, width in grids)
    per_patch = spec.vision_layers * spec.vision_params_per_layer
    linear = 2.0 * (patches * per_patch + patches // spec.group_size * spec.merger_params)
    whole = sum(time * (height * width) ** 2 for time, height, width in grids)
    windowed = sum(time * _squares(height, spec) * _squares(width, spec) for time, height, width in grids)
    pairs = spec.vision_full_layers * whole + (spec.vision_layers - spec.vision_full_layers) * windowed
    return Flops(linear, 4.0 * spec.vision_hidden * pairs, 2.0 * patches * spec.patch_params)


def head_flops(spec: "BackboneSpec", rows: int) -> Flops:
    """The language head at so many positions."""
    return Flops(2.0 * rows * spec.text_hidden * spec.vocab_size)


def mae_flops(spec: "BackboneSpec", lengths: Sequence[int], masked: Sequence[int], depth: int) -> Flops:
    """The MAE decoder of `depth` layers over sequences of these lengths (tokens), of which so many are painted."""
    tokens, painted = int(sum(lengths)), int(sum(masked))
    keys_and_values = 2 * spec.text_hidden * spec.text_kv_width
    last = tokens * keys_and_values + painted * (spec.text_params_per_layer - keys_and_values)
    projection = painted * spec.text_hidden * spec.group_size * spec.patch_values
    pairs = sum(int(n) * ((depth - 1) * int(n) + int(m)) for n, m in zip(lengths, masked, strict=True))
    linear = 2.0 * ((depth - 1) * tokens * spec.text_params_per_layer + last + projection)
    return Flops(linear, 4.0 * spec.text_width * pairs)


def _squares(side: int, spec: "BackboneSpec") -> int:
    """Sum of squares of the pieces that windows cut a side into, all in patches."""
    window = spec.vision_window_px // spec.factor_px * spec.merge_size
    if not window:
        return 0
    whole, rest = divmod(side, window)
    return whole * window**2 + rest**2
