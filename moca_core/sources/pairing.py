"""What the pair layouts share: rows of Parquet or JSON lines by role, names of tasks, and what may stand beside an answer."""

import re
from collections.abc import Iterable, Iterator, Mapping

from moca_core.sources import Location
from moca_core.sources.fields import MAX_CONTENT_BYTES, BadRow
from moca_core.sources.listing import find_files, line_units, parquet_units, row_group_units
from moca_core.sources.rows import json_rows, parquet_rows
from moca_core.types import Content, Pair

LINES = ".jsonl"
LINE_FILES = (LINES, LINES + ".gz", LINES + ".zst")

Columns = Mapping[str, tuple[str, ...]]


def is_parquet(path: str) -> bool:
    return path.lower().endswith(".parquet")


def table_units(location: Location) -> list[dict]:
    """Units of the Parquet files and of the files of JSON lines. Raises ValueError where there is neither."""
    files = [path for path, _ in find_files(location, ".parquet", *LINE_FILES)]
    parquet = [is_parquet(path) for path in files]
    units = parquet_units(location) if any(parquet) else []
    return units if all(parquet) else units + line_units(location, LINES)


def table_rows(
    location: Location, unit: dict, columns: Columns, optional: tuple[str, ...] = ()
) -> Iterator[tuple[str, dict | BadRow]]:
    """(where, {role: value}) of the rows of a unit, whichever kind its file is.

    A Parquet file without a column that is needed raises ValueError; of lines only the one without the key is a BadRow.
    """
    if is_parquet(unit["path"]):
        yield from parquet_rows(location, unit, columns, optional)
        return
    for where, row in json_rows(location, unit):
        yield where, row if isinstance(row, BadRow) else _by_role(row, columns, location.columns, optional)


def _by_role(row: dict, columns: Columns, given: Mapping[str, str], optional: tuple[str, ...]) -> dict | BadRow:
    values = {}
    for role, known in columns.items():
        choices = (given[role],) if role in given else known
        name = next((choice for choice in choices if choice in row), None)
        if name is None and role not in optional:
            return BadRow("malformed_row", f"no {' or '.join(choices)} for {role!r}; it has {', '.join(row)[:200]}")
        values[role] = None if name is None else row[name]
    return values


def file_rows(
    location: Location, path: str, columns: Columns, optional: tuple[str, ...] = ()
) -> Iterator[tuple[str, dict | BadRow]]:
    """All rows of one file, from its first to its last."""
    units = row_group_units(location.fs, [path]) if is_parquet(path) else [{"path": path}]
    for unit in units:
        yield from table_rows(location, unit, columns, optional)


def task_name(path: str) -> str:
    """Folder and file, shards of one split taken together: ".../MSCOCO/train-00001-of-00004.parquet" is "MSCOCO/train".

    A file that is only a number is called after its folder (MSCOCO/train/0000.parquet, as converters write), a folder that
    says nothing gives way to the one above (visrag/data/train-...), and a name said twice is said once (VQA/VQA.parquet).
    """
    *folders, file = [part for part in path.split("/") if part]
    stem = re.sub(r"-\d+-of-\d+$", "", re.sub(r"\.(parquet|jsonl?(\.gz|\.zst)?)$", "", file))
    if stem.isdigit() and folders:
        stem = folders.pop()
    while folders and folders[-1] == "data":
        folders.pop()
    return f"{folders[-1]}/{stem}" if folders and folders[-1] != stem else stem


def modality(side: Content) -> str:
    """Texts or images; an instruction beside an image does not make it a text."""
    return "text" if all(segment.image is None for segment in side) else "image"


def blank(side: Content) -> bool:
    return not any(segment.image or (segment.text and segment.text.strip()) for segment in side)


def pair_of(
    task: str,
    query: Content,
    positives: Iterable[Content],
    negatives: Iterable[Content] = (),
    group: str | None = None,
) -> Pair:
    """A pair of what a row says, each answer once. Raises BadRow for a query without a right answer, and for too many bytes.

    Left out of the negatives are empty ones, with which public sets fill their lists, and copies of a right answer: to train
    against those teaches the opposite of what is wanted. Sides may be made as they are asked for, so that the bound holds.
    """
    held_bytes = 0

    def counted(sides: Iterable[Content]) -> Iterator[Content]:
        nonlocal held_bytes
        for side in sides:
            held_bytes += sum(len(segment.image or segment.text or b"") for segment in side)
            if held_bytes > MAX_CONTENT_BYTES:
                raise BadRow("pair_too_large", f"more than {MAX_CONTENT_BYTES} bytes in one pair")
            yield side

    right = tuple(dict.fromkeys(counted(positives)))
    if not right:
        raise BadRow("no_positive", "a query without a right answer")
    wrong = tuple(side for side in dict.fromkeys(counted(negatives)) if not blank(side) and side not in right)
    return Pair(task, query, right, wrong, group)
