"""MMEB evaluation Parquet: a query and its candidates as parallel lists, the right answer first. One task per file and direction."""

from collections.abc import Iterable, Iterator
from itertools import chain, groupby

from moca_core.sources import Location
from moca_core.sources.fields import BadRow
from moca_core.sources.listing import parquet_units
from moca_core.sources.mmeb import content, modality, task_name
from moca_core.sources.rows import parquet_rows
from moca_core.types import Content, EvalTask, Query, content_id

COLUMNS = {c: (c,) for c in ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")}
OPTIONS = {"columns": tuple(COLUMNS), "images": ()}


def read_tasks(location: Location) -> Iterator[EvalTask]:
    """Tasks of the file, or of every file of the folder. Raises ValueError for broken rows: a score needs all."""
    for path, units in groupby(parquet_units(location), key=lambda unit: unit["path"]):
        yield from _read_file(location, path, chain.from_iterable(parquet_rows(location, u, COLUMNS) for u in units))


def _read_file(location: Location, path: str, rows: Iterable[tuple[str, dict | BadRow]]) -> Iterator[EvalTask]:
    stem = task_name(path)
    queries: dict[str, list[Query]] = {}
    pools: dict[str, dict[str, int]] = {}
    contents: dict[str, list[Content]] = {}
    loaded: dict[tuple[str, str], Content] = {}
    for where, row in rows:
        if isinstance(row, BadRow):
            raise ValueError(f"{where}: {row}")
        if not row["tgt_text"] or len(row["tgt_text"]) != len(row["tgt_img_path"] or []):
            raise ValueError(f"{where}: tgt_text and tgt_img_path must be lists of one length, not empty")
        query = content(location, path, row["qry_text"], row["qry_img_path"])
        keys = list(zip(row["tgt_text"], row["tgt_img_path"], strict=True))
        targets = [loaded.get(key) or loaded.setdefault(key, content(location, path, *key)) for key in keys]
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
