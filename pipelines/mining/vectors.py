"""Vectors on storage: Parquet of float32, read block by block."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from pipelines.tables import open_table, table_writer

BLOCK_ROWS = 8192  # 64 MiB of 2,048 dimensions


def write_vectors(uri: str, vectors: np.ndarray) -> None:
    """vectors: [N, D]."""
    schema = pa.schema([("vector", pa.list_(pa.float32(), vectors.shape[1]))])
    with table_writer(uri, schema, BLOCK_ROWS) as writer:
        values = pa.array(vectors.reshape(-1), pa.float32())
        column = pa.FixedSizeListArray.from_arrays(values, vectors.shape[1])
        writer.write(pa.Table.from_arrays([column], schema=schema))


def read_vectors(uri: str) -> Iterator[np.ndarray]:
    """[n, D] each, n at most BLOCK_ROWS."""
    file = open_table(uri)
    dimension = file.schema_arrow.field("vector").type.list_size
    for group in range(file.num_row_groups):
        column = file.read_row_group(group)["vector"].combine_chunks()
        yield np.array(column.flatten()).reshape(-1, dimension)
