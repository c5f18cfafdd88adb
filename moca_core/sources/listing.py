"""Finding and reading the files of a layout."""

import posixpath
from collections.abc import Iterator

import pyarrow.fs as pafs
import pyarrow.parquet as pq

BATCH_ROWS = 64  # rows held in memory at a time, encoded images included


def find_files(fs: pafs.FileSystem, path: str, extension: str) -> list[dict]:
    """One unit per file under `path` (a file or a folder), in name order. Raises ValueError where there is none."""
    info = fs.get_file_info(path)
    if info.type == pafs.FileType.File:
        return [{"path": path}]
    if info.type == pafs.FileType.Directory:
        found = fs.get_file_info(pafs.FileSelector(path, recursive=True))
        paths = sorted(f.path for f in found if f.type == pafs.FileType.File and f.path.endswith(extension))
        if paths:
            return [{"path": p} for p in paths]
    raise ValueError(f"{path}: no {extension} file there")


def folder_name(path: str) -> str:
    """What a corpus is called that does not say: the folder of its file."""
    return posixpath.basename(posixpath.dirname(path))


def parquet_rows(fs: pafs.FileSystem, path: str, columns: list[str], optional: tuple[str, ...] = ()) -> Iterator[dict]:
    """Rows of one Parquet file, a few at a time, with those of the `optional` columns that it has.

    Raises ValueError naming the columns that the layout needs and the file lacks.
    """
    with fs.open_input_file(path) as source:
        file = pq.ParquetFile(source)
        missing = [c for c in columns if c not in file.schema_arrow.names]
        if missing:
            raise ValueError(f"{path}: no column {', '.join(missing)}; it has {', '.join(file.schema_arrow.names)}")
        columns = [*columns, *(c for c in optional if c in file.schema_arrow.names)]
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=columns):
            yield from batch.to_pylist()


def read_beside(fs: pafs.FileSystem, path: str, name: str) -> bytes:
    """Bytes of the file `name`, which a row of the file `path` names relative to that file's folder.

    Raises FileNotFoundError, also for a name that points out of the folder, and for a folder.
    """
    relative = posixpath.normpath(name)
    if relative.startswith(("/", "..")):
        raise FileNotFoundError(f"{name} lies outside the folder of {path}")
    full = posixpath.join(posixpath.dirname(path), relative)
    try:
        with fs.open_input_file(full) as source:
            return source.read()
    except OSError:
        if fs.get_file_info(full).type == pafs.FileType.Directory:
            raise FileNotFoundError(f"{name} is a folder") from None
        raise
