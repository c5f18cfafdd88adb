"""Texts: a column of Parquet (FineWeb) or a field of JSON lines (DCLM, C4, Dolma; also .gz and .zst), or .txt files, one document each.

One folder may hold all three. A row without the field, or with an empty one, is an empty document, which validation rejects.
"""

from collections.abc import Callable, Iterator

from moca_core.sources import Location
from moca_core.sources.fields import BadRow, as_text, read_file
from moca_core.sources.listing import byte_range_units, find_files, folder_name, row_group_units, small_file_units
from moca_core.sources.rows import json_rows, parquet_rows, read_rows
from moca_core.types import Document, Rejected, Segment

COLUMNS = {"text": ("text", "content", "raw_content", "markdown", "body", "document")}
OPTIONS = {"columns": tuple(COLUMNS)}

# A plain .json is no list of lines, as a rule, but beside .gz it is (C4).
LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".ndjson.gz", ".ndjson.zst", ".json.gz", ".json.zst")
MAX_FILE_BYTES = 64 * 2**20


def list_units(location: Location) -> list[dict]:
    files = find_files(location, ".parquet", ".txt", *LINES)
    tables = [path for path, _ in files if _is(path, ".parquet")]
    lines = [(path, size) for path, size in files if not _is(path, ".parquet", ".txt")]
    texts = [(path, size) for path, size in files if _is(path, ".txt")]
    return row_group_units(location.fs, tables) + byte_range_units(lines) + small_file_units(texts)


def read_unit(location: Location, unit: dict) -> Iterator[Document | Rejected]:
    if "paths" in unit:
        return (item for path in unit["paths"] for item in read_rows(_file(location, path), _document(path, "text")))
    path = unit["path"]
    if "groups" in unit:
        return read_rows(parquet_rows(location, unit, COLUMNS), _document(path, "text"))
    return read_rows(json_rows(location, unit), _document(path, *_fields(location)))


def _fields(location: Location) -> tuple[str, ...]:
    return (location.columns["text"],) if "text" in location.columns else COLUMNS["text"]


def _document(path: str, *fields: str) -> Callable[[dict], Document]:
    def document(row: dict) -> Document:
        name = next((field for field in fields if field in row), None)
        if name is None:
            raise BadRow("malformed_row", f"no {' or '.join(fields)}; it has {', '.join(row)[:200]}")
        return Document(folder_name(path), (Segment(text=as_text(row[name], name)),))

    return document


def _file(location: Location, path: str) -> Iterator[tuple[str, dict | BadRow]]:
    try:
        yield path, {"text": read_file(location.fs, path, MAX_FILE_BYTES).decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        yield path, BadRow("malformed_text", str(error))
    except BadRow as error:
        yield path, error


def _is(path: str, *extensions: str) -> bool:
    return path.lower().endswith(extensions)
