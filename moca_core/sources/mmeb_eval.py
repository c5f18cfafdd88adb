"""MMEB evaluation Parquet: a query and its candidates as parallel lists, the right answer first. One task per split and direction."""

from collections.abc import Iterator
from itertools import groupby

from moca_core.sources import Location
from moca_core.sources.fields import BadRow
from moca_core.sources.listing import parquet_units
from moca_core.sources.mmeb import content, parallel
from moca_core.sources.pairing import modality, task_name
from moca_core.sources.rows import parquet_rows
from moca_core.types import Content, EvalTask, Query, content_id

TARGETS = ("tgt_text", "tgt_img_path")
COLUMNS = {c: (c,) for c in ("qry_text", "qry_img_path", *TARGETS)}
OPTIONS = {"columns": tuple(COLUMNS), "images": ()}


def read_tasks(location: Location) -> Iterator[EvalTask]:
    """Tasks of the file, or of every split of the folder. Raises ValueError for broken rows: a score needs all."""
    for name, units in groupby(parquet_units(location), key=lambda unit: task_name(unit["path"])):
        yield from _read_split(location, name, list(units))


def _read_split(location: Location, name: str, units: list[dict]) -> Iterator[EvalTask]:
    tasks: dict[str, _Pool] = {}
    loaded: dict[tuple[str, str], Content] = {}
    for unit in units:
        for where, row in parquet_rows(location, unit, COLUMNS):
            try:
                query, targets = _read_row(location, unit["path"], row, loaded)
            except BadRow as error:
                raise ValueError(f"{where}: {error}") from None
            pool = tasks.setdefault(f"{name}/{modality(query)}-to-{modality(targets[0])}", _Pool())
            pool.ask(query, targets)
    for task, pool in tasks.items():
        yield EvalTask(task, tuple(pool.queries), tuple(pool.candidates))


def _read_row(
    location: Location, path: str, row: dict | BadRow, loaded: dict[tuple[str, str], Content]
) -> tuple[Content, list[Content]]:
    """The query and its candidates; `loaded` holds those that earlier rows had too. Raises BadRow."""
    if isinstance(row, BadRow):
        raise row
    query = content(location, path, row["qry_text"], row["qry_img_path"])
    targets = parallel(row["tgt_text"], row["tgt_img_path"], TARGETS)
    if not targets:
        raise BadRow("malformed_row", "no candidates in tgt_text and tgt_img_path")
    for target in targets:
        if target not in loaded:
            loaded[target] = content(location, path, *target)
    return query, [loaded[target] for target in targets]


class _Pool:
    """Queries of one task, and every candidate that one of them has, once."""

    def __init__(self) -> None:
        self.queries: list[Query] = []
        self.candidates: list[Content] = []
        self._places: dict[str, int] = {}

    def ask(self, query: Content, targets: list[Content]) -> None:
        """Adds a query and its candidates, the first of which is the right answer."""
        places = [self._place(target) for target in targets]
        self.queries.append(Query(query, (places[0],), tuple(dict.fromkeys(places))))

    def _place(self, target: Content) -> int:
        place = self._places.setdefault(content_id(target), len(self.candidates))
        if place == len(self.candidates):
            self.candidates.append(target)
        return place
