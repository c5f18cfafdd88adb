"""Corpus tables to packed rows: render, then pack. Pure functions of a table, so that any engine can map them."""

import numpy as np
import pyarrow as pa

from moca_core.data.packing import pack
from moca_core.data.render import Rendered, Renderer
from moca_core.data.schema import PACKED, SEQUENCES, table_to_documents
from moca_core.spec import BackboneSpec


def render_documents(corpus: pa.Table, renderer: Renderer) -> pa.Table:
    """SEQUENCES table of all pieces of all documents, in order. A piece is named after its document and its place in it."""
    rows = [
        sequence_row(f"{d.doc_id}:{k}", piece)
        for d in table_to_documents(corpus)
        for k, piece in enumerate(renderer.pieces(d.content))
    ]
    return pa.Table.from_pylist(rows, schema=SEQUENCES)


def pack_sequences(sequences: pa.Table, spec: BackboneSpec, budget_tokens: int) -> pa.Table:
    """PACKED table: all sequences of the window in rows of at most `budget_tokens`."""
    lengths = [len(ids) for ids in sequences["input_ids"]]
    rows = sequences.to_pylist()
    return pa.Table.from_pylist(
        [packed_row([rows[i] for i in members], spec) for members in pack(lengths, budget_tokens)], schema=PACKED
    )


def pack_contents(rendered: list[Rendered], spec: BackboneSpec, budget_tokens: int) -> list[tuple[list[int], dict]]:
    """(which sequences, their packed row) for sequences held in memory."""
    groups = pack([len(r) for r in rendered], budget_tokens)
    rows = [sequence_row(str(i), r) for i, r in enumerate(rendered)]
    return [(members, packed_row([rows[i] for i in members], spec)) for members in groups]


def sequence_row(piece_id: str, rendered: Rendered) -> dict:
    return {
        "piece_id": piece_id,
        "input_ids": rendered.input_ids,
        "images": rendered.images,
        "grid_thw": rendered.grids,
    }


def packed_row(sequences: list[dict], spec: BackboneSpec) -> dict:
    """One row of the PACKED table: these sequences, in this order."""
    lengths = [len(s["input_ids"]) for s in sequences]
    grids = [grid for s in sequences for grid in s["grid_thw"]]
    return {
        "piece_ids": [s["piece_id"] for s in sequences],
        "segment_lengths": lengths,
        "input_ids": np.concatenate([np.asarray(s["input_ids"], dtype=np.int32) for s in sequences]),
        "images": [image for s in sequences for image in s["images"]],
        "grid_thw": grids,
        "cost_flops": spec.flops(lengths, [int(np.prod(grid)) for grid in grids]),
    }
