"""Finding the files of a layout, and cutting them into units that can be read apart from each other."""

import posixpath
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pyarrow.fs as pafs
import pyarrow.parquet as pq
from fsspec.utils import glob_translate

from moca_core.sources import Location
from moca_core.sources.fields import BadRow
from moca_core.sources.rows import broken_data

UNIT_BYTES = 64 * 2**20
"""A unit holds about this much of a file that can be cut: enough to be worth a task, little enough to sample by."""

FILES_PER_UNIT = 256
FOOTERS_AT_ONCE = 16
PACKED = (".gz", ".zst")


def find_files(location: Location, *extensions: str) -> list[tuple[str, int]]:
    """(path, size in bytes) of the files at a file, below a folder or matching a glob, in name order.

    Of a folder or a glob only files with one of the extensions count, and none below a hidden folder. Raises ValueError
    where there is none.
    """
    fs, path = location.fs, location.path
    info = fs.get_file_info(path)
    if info.type == pafs.FileType.File:
        return [(path, info.size)]
    folder, matches = path, re.compile("")
    if info.type == pafs.FileType.NotFound and (magic := re.search(r"[*?\[]", path)):
        folder, matches = posixpath.dirname(path[: magic.start()]), re.compile(glob_translate(path))
    found = fs.get_file_info(pafs.FileSelector(folder, recursive=True, allow_not_found=True))
    files = sorted(
        (f.path, f.size)
        for f in found
        if f.type == pafs.FileType.File
        and f.path.lower().endswith(extensions)
        and matches.match(f.path)
        and "/." not in f.path.removeprefix(folder)
    )
    if not files:
        raise ValueError(f"{path}: no {' or '.join(extensions)} file there")
    return files


def folder_name(path: str) -> str:
    """What a corpus is called that does not say: the folder of its file."""
    return posixpath.basename(posixpath.dirname(path))


def file_units(location: Location, *extensions: str) -> list[dict]:
    """One unit per file, for layouts that cannot be cut."""
    return [{"path": path} for path, _ in find_files(location, *extensions)]


def parquet_units(location: Location) -> list[dict]:
    """Runs of neighbouring row groups of about `UNIT_BYTES`: {"path", "groups": [first, end], "first_row", "rows"}.

    A file without a readable footer is one unit, which will say so when it is read.
    """
    return row_group_units(location.fs, [path for path, _ in find_files(location, ".parquet")])


def row_group_units(fs: pafs.FileSystem, paths: list[str]) -> list[dict]:
    """`parquet_units` of these files; their footers are read several at a time, which on S3 is all waiting."""
    with ThreadPoolExecutor(FOOTERS_AT_ONCE) as threads:
        by_file = threads.map(partial(_row_groups, fs), paths)
        return [unit for units in by_file for unit in units]


def _row_groups(fs: pafs.FileSystem, path: str) -> list[dict]:
    try:
        with fs.open_input_file(path) as source, broken_data():
            metadata = pq.read_metadata(source)
    except BadRow:
        return [{"path": path, "groups": [0, 1], "first_row": 0, "rows": 0}]
    units: list[dict] = []
    row, held_bytes = 0, UNIT_BYTES
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        if held_bytes >= UNIT_BYTES:
            units.append({"path": path, "groups": [number, number], "first_row": row, "rows": 0})
            held_bytes = 0
        units[-1]["groups"][1] = number + 1
        units[-1]["rows"] += group.num_rows
        row += group.num_rows
        held_bytes += group.total_byte_size  # not of its columns: Arrow ends the process over a broken entry of one
    return units


def line_units(location: Location, *extensions: str) -> list[dict]:
    """Ranges of bytes of plain files, {"path", "bytes": [start, end]}: a line belongs to the range in which it starts.

    A compressed file (.gz, .zst) cannot be cut: one unit, {"path"}.
    """
    names = [extension + packed for extension in extensions for packed in ("", *PACKED)]
    return byte_range_units(find_files(location, *names))


def byte_range_units(files: list[tuple[str, int]]) -> list[dict]:
    """`line_units` of these (path, size)."""
    units: list[dict] = []
    for path, size in files:
        if path.lower().endswith(PACKED):
            units.append({"path": path})
        else:
            units += [{"path": path, "bytes": [at, min(at + UNIT_BYTES, size)]} for at in range(0, size, UNIT_BYTES)]
    return units


def small_file_units(files: list[tuple[str, int]]) -> list[dict]:
    """Runs of neighbouring files of about `UNIT_BYTES` and at most `FILES_PER_UNIT`: {"paths", "rows"}, a row being a file."""
    units: list[dict] = []
    held_bytes = 0
    for path, size in files:
        if not units or held_bytes + size > UNIT_BYTES or units[-1]["rows"] == FILES_PER_UNIT:
            units.append({"paths": [], "rows": 0})
            held_bytes = 0
        units[-1]["paths"].append(path)
        units[-1]["rows"] += 1
        held_bytes += size
    return units
