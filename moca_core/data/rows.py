"""Documents to packed rows: render, then pack. Pure functions, so that any engine can run them."""

import numpy as np

from moca_core.data.packing import pack, pack_evenly
from moca_core.data.render import Rendered, Renderer
from moca_core.spec import BackboneSpec
from moca_core.types import Document


def document_sequences(document: Document, renderer: Renderer) -> list[dict]:
    """The pieces of a document, in order. A piece is named after its document and its place in it."""
    doc_id = document.doc_id  # a hash of all that the document holds: once, not for every piece
    return [sequence_row(f"{doc_id}:{k}", piece) for k, piece in enumerate(renderer.pieces(document.content))]


def pack_sequences(sequences: list[dict], spec: BackboneSpec, budget_tokens: int) -> list[dict]:
    """Rows of the PACKED table: all sequences, in packs of at most `budget_tokens` and of about equal cost."""
    lengths = [len(s["input_ids"]) for s in sequences]
    costs = [spec.flops([n], s["grid_thw"]) for n, s in zip(lengths, sequences, strict=True)]
    return [packed_row([sequences[i] for i in members], spec) for members in pack_evenly(lengths, costs, budget_tokens)]


def pack_contents(rendered: list[Rendered], spec: BackboneSpec, budget_tokens: int) -> list[tuple[list[int], dict]]:
    """(which sequences, their packed row) for sequences held in memory, in as few packs as can be."""
    groups = pack([len(r) for r in rendered], budget_tokens)
    rows = [sequence_row(str(i), r) for i, r in enumerate(rendered)]
    return [(members, packed_row([rows[i] for i in members], spec)) for members in groups]


def sequence_row(piece_id: str, rendered: Rendered) -> dict:
    return {
        "piece_id": piece_id,
        "input_ids": np.asarray(rendered.input_ids, dtype=np.int32),
        "images": rendered.images,
        "grid_thw": rendered.grids,
    }


def packed_row(sequences: list[dict], spec: BackboneSpec) -> dict:
    """One row of the PACKED table: these sequences, in this order."""
    lengths = [len(s["input_ids"]) for s in sequences]
    return {
        "piece_ids": [s["piece_id"] for s in sequences],
        "segment_lengths": lengths,
        "input_ids": np.concatenate([s["input_ids"] for s in sequences]),
        "images": [image for s in sequences for image in s["images"]],
        "grid_thw": [grid for s in sequences for grid in s["grid_thw"]],
        "cost_flops": spec.flops(lengths, [grid for s in sequences for grid in s["grid_thw"]]),
    }
