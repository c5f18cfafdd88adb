"""Masking: a packed row becomes a micro-batch of continual pre-training (paper, section 3.1).

Masks and noise depend on (seed, epoch, piece id) alone, so worker count, restarts and how pieces are packed never change them.
"""

import numpy as np

from moca_core.data.images import read_patches
from moca_core.data.positions import position_ids
from moca_core.rng import generator, seed_of
from moca_core.spec import BackboneSpec
from moca_core.types import MaskedBatch, TokenStream

IGNORED = -100


def packed_stream(row: dict, spec: BackboneSpec, *, fast: bool = False) -> TokenStream:
    """The row as it is, unmasked. Its images were checked against their bounds where they entered (data/validate.py).

    `fast` reads them with fewer operations and slightly other pixels (data/images.py:read_patches): for training.
    """
    input_ids = np.asarray(row["input_ids"], dtype=np.int64)
    grids = np.asarray(row["grid_thw"], dtype=np.int64).reshape(-1, 3)
    ends = np.cumsum([0, *grids.prod(axis=1)])
    pixels = np.empty((ends[-1], spec.patch_values), np.uint8)
    for image, start, end in zip(row["images"], ends[:-1], ends[1:], strict=True):
        read_patches(image, spec, fast=fast, out=pixels[start:end])
    lengths = list(row["segment_lengths"])
    return TokenStream(
        input_ids=input_ids,
        cu_seqlens=np.cumsum([0, *lengths], dtype=np.int32),
        position_ids=position_ids(input_ids, lengths, grids, spec),
        pixels=pixels,
        grid_thw=grids,
    )


def mask(row: dict, spec: BackboneSpec, *, seed: int, epoch: int, mlm_ratio: float, mae_ratio: float) -> MaskedBatch:
    """Replaces text tokens by the mask token with probability `mlm_ratio` and marks image tokens with probability `mae_ratio`.

    Special tokens and the first token of a sequence stay: nothing in the sequence comes before it to predict it from.
    """
    stream = packed_stream(row, spec, fast=True)
    is_image = stream.input_ids == spec.image_token_id
    masked_text = np.zeros(len(stream.input_ids), dtype=bool)
    masked_image = np.zeros(len(stream.input_ids), dtype=bool)
    for piece_id, start, end in zip(row["piece_ids"], stream.cu_seqlens[:-1], stream.cu_seqlens[1:], strict=True):
        draws = generator(seed, epoch, piece_id, "mask").random((2, end - start))
        masked_text[start:end] = draws[0] < mlm_ratio
        masked_text[start] = False
        masked_image[start:end] = draws[1] < mae_ratio
    masked_text &= ~np.isin(stream.input_ids, spec.special_token_ids)
    labels = np.where(masked_text, stream.input_ids, IGNORED)
    stream.input_ids = np.where(masked_text, spec.mask_token_id, stream.input_ids)
    return MaskedBatch(
        stream=stream,
        labels=labels,
        masked_groups=masked_image[is_image],
        noise_seeds=_noise_seeds(row, seed, epoch),
    )


def blank(spec: BackboneSpec) -> MaskedBatch:
    """A batch of one token with nothing to restore: for a rank that has no row left while others have."""
    row = {"input_ids": [spec.mask_token_id], "segment_lengths": [1], "images": [], "grid_thw": []}
    return MaskedBatch(
        stream=packed_stream(row, spec),
        labels=np.array([IGNORED]),
        masked_groups=np.zeros(0, dtype=bool),
        noise_seeds=np.zeros(1, dtype=np.int64),
    )


def next_token(row: dict, spec: BackboneSpec, *, seed: int, epoch: int) -> MaskedBatch:
    """The unmasked row with every text token as a label: what an ordinary causal model trains on.

    `seed` and `epoch` change nothing of it: they tell what was consumed, as with `mask`.
    """
    stream = packed_stream(row, spec, fast=True)
    predictable = ~np.isin(stream.input_ids, spec.special_token_ids)
    predictable[stream.cu_seqlens[:-1]] = False
    groups = int((stream.input_ids == spec.image_token_id).sum())
    return MaskedBatch(
        stream=stream,
        labels=np.where(predictable, stream.input_ids, IGNORED),
        masked_groups=np.zeros(groups, dtype=bool),
        noise_seeds=_noise_seeds(row, seed, epoch),
    )


def _noise_seeds(row: dict, seed: int, epoch: int) -> np.ndarray:
    return np.array([seed_of(seed, epoch, piece_id, "noise") for piece_id in row["piece_ids"]])
