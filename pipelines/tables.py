"""Writing tables as Parquet on any storage, whole or not at all."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage

T = TypeVar("T")


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


class TableWriter:
    """Appends tables to one Parquet file, in row groups of `rows_per_group` so that a row can be fetched by its address."""

    def __init__(self, sink: pa.NativeFile, schema: pa.Schema, rows_per_group: int) -> None:
        self._writer = pq.ParquetWriter(sink, schema, compression="zstd")
        self._rows_per_group, self.rows = rows_per_group, 0

    def write(self, table: pa.Table) -> None:
        """Every call but the last must bring a multiple of `rows_per_group` rows: addresses count on full groups."""
        assert self.rows % self._rows_per_group == 0, f"{self.rows} rows were written before, not whole groups"
        self._writer.write_table(table, row_group_size=self._rows_per_group)
        self.rows += table.num_rows

    def close(self) -> None:
        self._writer.close()


@contextmanager
def table_writer(uri: str, schema: pa.Schema, rows_per_group: int) -> Iterator[TableWriter]:
    """A writer whose file appears under its name when the block ends well, and not at all otherwise."""
    sink = pa.BufferOutputStream()
    writer = TableWriter(sink, schema, rows_per_group)
    yield writer
    writer.close()
    storage.write_atomic(uri, sink.getvalue().to_pybytes())


@lru_cache(maxsize=32)
def open_table(uri: str) -> pq.ParquetFile:
    """An open Parquet file, kept by this process: its footer is read once, rows are fetched group by group."""
    fs, path = storage.filesystem(uri)
    return pq.ParquetFile(fs.open_input_file(path))


def read_rows(uri: str, rows: list[int], rows_per_group: int) -> list[dict]:
    """Rows of a file written by `table_writer`, by their place in it."""
    file = open_table(uri)
    groups = {row // rows_per_group: None for row in rows}
    for group in groups:
        groups[group] = file.read_row_group(group)
    return [groups[row // rows_per_group].slice(row % rows_per_group, 1).to_pylist()[0] for row in rows]


def read_table(uri: str) -> pa.Table:
    fs, path = storage.filesystem(uri)
    return pq.read_table(path, filesystem=fs)
