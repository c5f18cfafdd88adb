"""Batches as bytes, on their way from the data workers to a training worker: safetensors, no pickle."""

from dataclasses import fields

import numpy as np
from safetensors.numpy import load, save

from moca_core.types import MaskedBatch, PairBatch, TokenStream

BATCH_TYPES = {batch_type.__name__: batch_type for batch_type in (MaskedBatch, PairBatch)}


def to_bytes(batch: MaskedBatch | PairBatch) -> bytes:
    arrays = {f"stream.{f.name}": getattr(batch.stream, f.name) for f in fields(TokenStream)}
    arrays |= {f.name: np.asarray(getattr(batch, f.name)) for f in fields(batch) if f.name != "stream"}
    arrays[f"type.{type(batch).__name__}"] = np.zeros(0, np.uint8)
    return save({name: np.asarray(array, order="C") for name, array in arrays.items()})


def from_bytes(data: bytes) -> MaskedBatch | PairBatch:
    arrays = load(data)
    batch_type = next(BATCH_TYPES[name.removeprefix("type.")] for name in arrays if name.startswith("type."))
    stream = TokenStream(**{f.name: arrays[f"stream.{f.name}"] for f in fields(TokenStream)})
    rest = {f.name: arrays[f.name] for f in fields(batch_type) if f.name != "stream"}
    return batch_type(stream, **{name: array if array.ndim else array.item() for name, array in rest.items()})
