"""Rows of a unit with where they stand, and rows to documents or pairs: what cannot be read gets a reason instead."""

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from moca_core.sources import Location
from moca_core.sources.fields import BadRow
from moca_core.types import Document, Pair, Rejected

BATCH_ROWS = 16  # rows held in memory at a time, encoded images included
MAX_LINE_BYTES = 64 * 2**20  # what JSON makes of a line can take 25 times that
BUFFER_BYTES = 2**20
PACKED_BUFFER_BYTES = 2**14  # what is lost before the place where a compressed file breaks
MAX_DETAIL_CHARS = 1000

Entry = TypeVar("Entry", Document, Pair)


@contextmanager
def broken_data() -> Iterator[None]:
    """Whatever Arrow makes of a broken file, as BadRow. Its OSErrors have no number then; those of the storage have one, and pass."""
    try:
        yield
    except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        raise BadRow("unreadable_file", str(error)) from None


def read_rows(
    rows: Iterable[tuple[str, dict | BadRow]], convert: Callable[[dict], Entry]
) -> Iterator[Entry | Rejected]:
    """Every row converted, with where it stands; a row for which `convert` raises BadRow as a rejection."""
    for where, row in rows:
        try:
            if isinstance(row, BadRow):
                raise row
            yield replace(convert(row), where=where)
        except BadRow as error:
            yield Rejected(error.reason, _readable(str(error)), _readable(where))


def _readable(text: str) -> str:
    """Bounded, and storable: what a hostile row is called may have no UTF-8."""
    return text[:MAX_DETAIL_CHARS].encode(errors="backslashreplace").decode()


def parquet_rows(
    location: Location, unit: dict, columns: Mapping[str, tuple[str, ...]], optional: tuple[str, ...] = ()
) -> Iterator[tuple[str, dict | BadRow]]:
    """("file row N", {role: value}) of the rows of a unit, a few at a time.

    `columns` names for every role the columns that may play it, the first that the file has being taken;
    `location.columns` goes before. A role that is `optional` is None where the file has none of its columns.
    Raises ValueError naming what the layout needs and the file lacks.
    """
    path, row_number = unit["path"], unit["first_row"]
    try:
        with location.fs.open_input_file(path) as source, broken_data():
            file = pq.ParquetFile(source, buffer_size=BUFFER_BYTES)  # streams a row group, however large
            names = pick_columns(path, file.schema_arrow.names, columns, location.columns, optional)
            groups = list(range(*unit["groups"]))
            for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=sorted({*names.values()})):
                read = {role: batch.column(batch.schema.get_all_field_indices(name)[0]) for role, name in names.items()}
                for number in range(batch.num_rows):
                    yield f"{path} row {row_number}", _values(columns, read, number)
                    row_number += 1
    except BadRow as error:
        yield f"{path} from row {row_number}", error


def _values(columns: Iterable[str], read: Mapping[str, pa.Array], number: int) -> dict | BadRow:
    """{role: value} of one row: Arrow reads bytes that are no UTF-8, and dates that there are not, without a word."""
    try:
        return {role: read[role][number].as_py() if role in read else None for role in columns}
    except UnicodeDecodeError as error:
        return BadRow("malformed_text", str(error))
    except (ValueError, ArithmeticError) as error:
        return BadRow("malformed_row", f"{type(error).__name__}: {error}")


def pick_columns(
    path: str,
    there: list[str],
    columns: Mapping[str, tuple[str, ...]],
    given: Mapping[str, str],
    optional: tuple[str, ...],
) -> dict[str, str]:
    """{role: column}. Raises ValueError for a role that must be played and is not."""
    names: dict[str, str] = {}
    for role, known in columns.items():
        choices = (given[role],) if role in given else known
        name = next((choice for choice in choices if choice in there), None)
        if name is not None:
            names[role] = name
        elif role not in optional or role in given:
            raise ValueError(f"{path}: no column {' or '.join(choices)} for {role!r}; it has {', '.join(there)}")
    return names


def json_rows(location: Location, unit: dict) -> Iterator[tuple[str, dict | BadRow]]:
    """("file byte N", object) of the lines of a unit; N counts unpacked bytes up to the start of the line."""
    path, offset = unit["path"], 0
    try:
        with broken_data():
            for offset, line in _lines(location, unit):
                where = f"{path} byte {offset}"
                if len(line) > MAX_LINE_BYTES:
                    yield where, BadRow("line_too_long", f"more than {MAX_LINE_BYTES} bytes")
                elif line.strip():
                    yield where, _parse(line)
    except BadRow as error:
        yield f"{path} after byte {offset}", error


def _parse(line: bytes) -> dict | BadRow:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return BadRow("malformed_json", f"{error} in {line[:60]!r}")
    return row if isinstance(row, dict) else BadRow("malformed_json", f"an object was expected, got {line[:60]!r}")


def _lines(location: Location, unit: dict) -> Iterator[tuple[int, bytes]]:
    """(offset, line) for every line that starts in the unit; of a line that is too long only its beginning."""
    path = unit["path"]
    start, end = unit.get("bytes", (0, None))
    with location.fs.open_input_file(path) as raw:
        lines = unpacked(raw, path)
        offset = start
        if start:
            lines.seek(start - 1)  # the byte before tells whether a line starts here
            offset += _skip_line(lines) - 1
        while (end is None or offset < end) and (line := lines.readline(MAX_LINE_BYTES + 1)):
            yield offset, line
            offset += len(line)
            if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                offset += _skip_line(lines)


def unpacked(raw: pa.NativeFile, path: str) -> io.BufferedReader:
    """The stream of a file, decompressed if it is called .gz (.tgz) or .zst, frames behind each other as one."""
    packed = {"gz": "gzip", "tgz": "gzip", "zst": "zstd"}.get(path.rpartition(".")[2].lower())
    if not packed:
        return io.BufferedReader(raw, BUFFER_BYTES)
    return io.BufferedReader(pa.CompressedInputStream(raw, packed), PACKED_BUFFER_BYTES)


def _skip_line(lines: io.BufferedReader) -> int:
    """Reads to the end of the line, holding little of it; the number of bytes passed."""
    passed = 0
    while part := lines.readline(BUFFER_BYTES):
        passed += len(part)
        if part.endswith(b"\n"):
            break
    return passed
