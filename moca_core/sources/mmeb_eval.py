"""MMEB evaluation Parquet: a query and its candidates as parallel lists, the right answer first.

    MMEB-eval/ImageNet-1K/test-*.parquet   version 1: qry_text, qry_img_path, tgt_text, tgt_img_path
    MMEB-V2/ImageNet-1K/test-*.parquet     version 2: instructions apart, in qry_inst and tgt_inst

A file or folder that is called after a task of the benchmark is that task; of any other, each direction ("image-to-text") is one.
"""

from collections.abc import Iterator
from itertools import groupby

from moca_core.benchmarks import known_name
from moca_core.sources import Location
from moca_core.sources.fields import BadRow, as_text
from moca_core.sources.listing import parquet_units
from moca_core.sources.mmeb import PLACEHOLDER, content, parallel
from moca_core.sources.pairing import modality, task_name
from moca_core.sources.rows import parquet_rows
from moca_core.types import Content, EvalTask, Query, content_id

TARGETS = ("tgt_text", "tgt_img_path")
OPTIONAL = ("qry_img_path", "tgt_img_path", "qry_inst", "tgt_inst")
COLUMNS = {c: (c,) for c in ("qry_text", "tgt_text", *OPTIONAL)}
OPTIONS = {"columns": tuple(COLUMNS), "images": ()}


def read_tasks(location: Location) -> Iterator[EvalTask]:
    """Tasks of the file, or of every split of the folder. Raises ValueError for broken rows: a score needs all."""
    yield from tasks_of(location, parquet_units(location))


def tasks_of(location: Location, units: list[dict]) -> Iterator[EvalTask]:
    """Those of these row groups."""
    for name, members in groupby(units, key=lambda unit: task_name(unit["path"])):
        yield from _read_split(location, name, list(members))


def _read_split(location: Location, name: str, units: list[dict]) -> Iterator[EvalTask]:
    tasks: dict[str, _Pool] = {}
    loaded: dict[tuple[str, ...], Content] = {}
    known = known_name(name)
    ending = "\n\n" if known == "VisDial" else "\n"  # of queries, as in version 1
    for unit in units:
        for where, row in parquet_rows(location, unit, COLUMNS, OPTIONAL):
            try:
                query, targets = _read_row(location, unit["path"], row, ending, loaded)
            except BadRow as error:
                raise ValueError(f"{where}: {error}") from None
            task = known or f"{name}/{modality(query)}-to-{modality(targets[0])}"
            tasks.setdefault(task, _Pool()).ask(query, targets)
    for task, pool in tasks.items():
        yield EvalTask(task, tuple(pool.queries), tuple(pool.candidates))


def _read_row(
    location: Location, path: str, row: dict | BadRow, ending: str, loaded: dict[tuple[str, ...], Content]
) -> tuple[Content, list[Content]]:
    """The query and its candidates; `loaded` holds those that earlier rows had too. Raises BadRow."""
    if isinstance(row, BadRow):
        raise row
    image, instruction = as_text(row["qry_img_path"], "qry_img_path"), as_text(row["tgt_inst"], "tgt_inst")
    text = _instructed(row["qry_inst"], as_text(row["qry_text"], "qry_text"), bool(image), ending)
    query = content(location, path, text, image)
    targets = parallel(row["tgt_text"], row["tgt_img_path"], TARGETS)
    if not targets:
        raise BadRow("malformed_row", "no candidates in tgt_text and tgt_img_path")
    for target in targets:
        if (instruction, *target) not in loaded:
            # An image that answers an image ends with its instruction; every other image with a line break.
            end = "" if image and not target[0].strip() else "\n"
            text = _instructed(instruction, target[0], True, end) if target[1] else target[0]
            loaded[instruction, *target] = content(location, path, text, target[1])
    return query, [loaded[instruction, *target] for target in targets]


def _instructed(instruction: str | None, text: str, image: bool, ending: str) -> str:
    """What a row of version 1 says, of the parts that version 2 has. Without an instruction the text as it is: version 1, or a label."""
    words = as_text(instruction, "instruction").replace(PLACEHOLDER, "").strip()
    if not words:
        return text
    return (f"{PLACEHOLDER}\n" if image else "") + " ".join(filter(None, (words, text))) + ending


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
