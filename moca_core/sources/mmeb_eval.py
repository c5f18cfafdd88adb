"""MMEB evaluation Parquet: a query and its candidates as parallel lists, the right answer first. One task per file and direction."""

from collections.abc import Iterator

import pyarrow.fs as pafs

from moca_core.sources.listing import find_files, parquet_rows
from moca_core.sources.mmeb import content, modality, task_name
from moca_core.types import Content, EvalTask, Query, content_id

COLUMNS = ["qry_text", "qry_img_path", "tgt_text", "tgt_img_path"]


def read_tasks(fs: pafs.FileSystem, path: str) -> Iterator[EvalTask]:
    """Tasks of the file, or of every file of the folder. Raises ValueError or FileNotFoundError for broken rows: a score needs all."""
    for unit in find_files(fs, path, ".parquet"):
        yield from _read_file(fs, unit["path"])


def _read_file(fs: pafs.FileSystem, path: str) -> Iterator[EvalTask]:
    stem = task_name(path)
    queries: dict[str, list[Query]] = {}
    pools: dict[str, dict[str, int]] = {}
    contents: dict[str, list[Content]] = {}
    loaded: dict[tuple[str, str], Content] = {}
    for number, row in enumerate(parquet_rows(fs, path, COLUMNS)):
        if not row["tgt_text"] or len(row["tgt_text"]) != len(row["tgt_img_path"] or []):
            raise ValueError(f"{path} row {number}: tgt_text and tgt_img_path must be lists of one length, not empty")
        query = content(fs, path, row["qry_text"], row["qry_img_path"])
        keys = list(zip(row["tgt_text"], row["tgt_img_path"], strict=True))
        targets = [loaded.get(key) or loaded.setdefault(key, content(fs, path, *key)) for key in keys]
        name = f"{stem}/{modality(query)}-to-{modality(targets[0])}"
        pool, known = pools.setdefault(name, {}), contents.setdefault(name, [])
        places = []
        for target in targets:
            place = pool.setdefault(content_id(target), len(known))
            if place == len(known):
                known.append(target)
            places.append(place)
        unique = tuple(dict.fromkeys(places))
        queries.setdefault(name, []).append(Query(query, (places[0],), unique))
    for name in queries:
        yield EvalTask(name, tuple(queries[name]), tuple(contents[name]))
