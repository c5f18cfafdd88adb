"""Vectors on storage: Parquet of float32, read block by block, with or without the ids of what they are vectors of."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from pipelines.tables import open_table, read_table, table_writer

BLOCK_ROWS = 8192  # 64 MiB of 2,048 dimensions
ID = "S16"  # numpy's type of an id: compared as bytes; what goes through Python loses zeros at its end


def write_vectors(uri: str, vectors: np.ndarray, ids: np.ndarray | None = None) -> None:
    """vectors: [N, D]; ids: [N] of type ID."""
    values = pa.array(vectors.reshape(-1), pa.float32())
    columns = {"vector": pa.FixedSizeListArray.from_arrays(values, vectors.shape[1])}
    if ids is not None:
        columns["id"] = id_column(ids)
    table = pa.table(columns)
    with table_writer(uri, table.schema, BLOCK_ROWS) as writer:
        writer.write(table)


def read_vectors(uri: str) -> Iterator[np.ndarray]:
    """[n, D] each, n at most BLOCK_ROWS."""
    file = open_table(uri)
    dimension = file.schema_arrow.field("vector").type.list_size
    for group in range(file.num_row_groups):
        column = file.read_row_group(group, columns=["vector"])["vector"].combine_chunks()
        yield np.array(column.flatten()).reshape(-1, dimension)


def read_ids(uri: str) -> np.ndarray:
    """The column `id` of any table, [N] of type ID."""
    return ids_of(read_table(uri, columns=["id"]))


def ids_of(table: pa.Table) -> np.ndarray:
    column = table["id"].combine_chunks()
    return np.frombuffer(column.buffers()[1], ID, count=len(column), offset=column.offset * column.type.byte_width)


def id_column(ids: np.ndarray) -> pa.Array:
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(16), len(ids), [None, pa.py_buffer(np.ascontiguousarray(ids))]
    )
