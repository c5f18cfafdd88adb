"""Writing tables as Parquet on any storage, whole or not at all."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from typing import BinaryIO, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster import storage

T = TypeVar("T")


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


class TableWriter:
    """Appends tables of any number of rows to one Parquet file, in row groups of exactly `rows_per_group` rows, the last
    one excepted: so a row can be fetched by its address. Less than one group is held back. `rows` counts all rows given.
    With `rows_per_group=None` every table is a row group.
    """

    def __init__(self, sink: BinaryIO, schema: pa.Schema, rows_per_group: int | None) -> None:
        self._writer = pq.ParquetWriter(sink, schema, compression="zstd")
        self._rows_per_group, self.rows = rows_per_group, 0
        self._held: list[pa.Table] = []

    def write(self, table: pa.Table) -> None:
        self.rows += table.num_rows
        if self._rows_per_group is None:
            self._writer.write_table(table, row_group_size=max(1, table.num_rows))
            return
        if table.num_rows:
            self._held.append(table)
        held = sum(t.num_rows for t in self._held)
        if held < self._rows_per_group:
            return
        pending, rest = pa.concat_tables(self._held), held % self._rows_per_group
        self._writer.write_table(pending.slice(0, held - rest), row_group_size=self._rows_per_group)
        # Taken, not sliced: a slice keeps all of its table in memory.
        self._held = [pending.take(list(range(held - rest, held)))] if rest else []

    def close(self) -> None:
        if self._held:
            self._writer.write_table(pa.concat_tables(self._held))
        self._writer.close()

    def abandon(self) -> None:
        """Ends without a footer. A Parquet writer that is neither closed nor abandoned writes one when it is collected."""
        self._writer.is_open = False


@contextmanager
def table_writer(uri: str, schema: pa.Schema, rows_per_group: int | None) -> Iterator[TableWriter]:
    """A writer whose file appears under its name when the block ends well, and not at all otherwise.

    Groups go to the storage as they fill.
    """
    with storage.open_writer(uri) as file:
        writer = TableWriter(file, schema, rows_per_group)
        try:
            yield writer
            writer.close()
        except BaseException:
            writer.abandon()
            raise


def parquet_file(uri: str) -> pq.ParquetFile:
    """An open Parquet file, of which row groups are fetched one by one. Not to be shared among threads: pyarrow breaks."""
    fs, path = storage.filesystem(uri)
    return pq.ParquetFile(fs.open_input_file(path))


@lru_cache(maxsize=32)
def open_table(uri: str) -> pq.ParquetFile:
    """The same, kept by this process, whose only thread reads it: the footer is read once."""
    return parquet_file(uri)


def read_rows(uri: str, rows: list[int], rows_per_group: int) -> list[dict]:
    """Rows of a file written by `table_writer`, by their place in it."""
    file = open_table(uri)
    groups = {row // rows_per_group: None for row in rows}
    for group in groups:
        groups[group] = file.read_row_group(group)
    return [groups[row // rows_per_group].slice(row % rows_per_group, 1).to_pylist()[0] for row in rows]


def read_table(uri: str, columns: list[str] | None = None, filters: pc.Expression | None = None) -> pa.Table:
    fs, path = storage.filesystem(uri)
    return pq.read_table(path, filesystem=fs, columns=columns, filters=filters)
