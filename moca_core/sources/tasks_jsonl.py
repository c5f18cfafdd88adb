"""One's own retrieval set as JSON lines: a folder with queries.jsonl and candidates.jsonl is a task.

    candidates.jsonl   {"id": "front", "content": {"image": "boards/front.png"}}
    queries.jsonl      {"query": "a board with two relays", "answers": ["front"]}
                       {"query": {"image": "relay.png"}, "answers": {"front": 2, "back": 1}, "candidates": ["front", "back", "side"]}

A query and a content are sides as pairs have them (sources/pairs_jsonl.py). `answers` names the right ones, or says of each how right
it is; `candidates` those that the query chooses from, without it all. Any other key is an error, and so is a broken line.
"""

import math
import posixpath
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moca_core.sources import Location
from moca_core.sources.beir_files import as_id
from moca_core.sources.fields import BadRow, as_list
from moca_core.sources.listing import find_files, folder_name
from moca_core.sources.pairs_jsonl import check_keys, side
from moca_core.sources.rows import json_rows
from moca_core.types import Content, EvalTask, Query

QUERIES, CANDIDATES = "queries.jsonl", "candidates.jsonl"
QUERY_KEYS = ("query", "answers", "candidates")
CANDIDATE_KEYS = ("id", "content")
OPTIONS = {"images": ()}


def read_tasks(location: Location) -> Iterator[EvalTask]:
    """A task for every folder that has both files. Raises ValueError where there is none, and for broken lines."""
    files = [path for path, _ in find_files(location, QUERIES, CANDIDATES)]
    folders = [posixpath.dirname(path) for path in files if posixpath.basename(path) == QUERIES]
    tasks = [folder for folder in folders if posixpath.join(folder, CANDIDATES) in files]
    if not tasks:
        raise ValueError(f"{location.path}: no folder with {QUERIES} and {CANDIDATES} there")
    for folder in tasks:
        yield _task(location, folder)


def _task(location: Location, folder: str) -> EvalTask:
    path = posixpath.join(folder, CANDIDATES)
    candidates: dict[str, Content] = {}
    for where, row in _rows(location, path, CANDIDATE_KEYS):
        with _told(where):
            name = as_id(row.get("id"), "id")
            if name in candidates:
                raise BadRow("malformed_row", f"a second candidate is called {name!r}")
            candidates[name] = side(location, path, row.get("content"), "content")
    places = {name: place for place, name in enumerate(candidates)}
    path = posixpath.join(folder, QUERIES)
    queries = []
    for where, row in _rows(location, path, QUERY_KEYS):
        with _told(where):
            queries.append(_query(location, path, row, places))
    return EvalTask(folder_name(path), tuple(queries), tuple(candidates.values()))


def _query(location: Location, path: str, row: dict, places: dict[str, int]) -> Query:
    answers = row.get("answers")
    if isinstance(answers, dict):
        graded = {_place(places, name): _grade(grade) for name, grade in answers.items()}
    else:
        graded = dict.fromkeys(_places(places, answers, "answers"), 1.0)
    if not graded:
        raise BadRow("no_positive", "a query without a right answer")
    given = row.get("candidates")
    pool = None if given is None else _places(places, given, "candidates")
    query = side(location, path, row.get("query"), "query")
    return Query(query, tuple(graded), pool, tuple(graded.values()) if isinstance(answers, dict) else None)


def _places(places: dict[str, int], names: Any, role: str) -> tuple[int, ...]:
    """Where these stand. Raises BadRow where one is named twice: to choose from it would then count twice."""
    found = [_place(places, name) for name in as_list(names, role)]
    for place, count in Counter(found).most_common(1):
        if count > 1:
            raise BadRow("malformed_row", f"{role}: {names[found.index(place)]!r} is named {count} times")
    return tuple(found)


def _place(places: dict[str, int], name: Any) -> int:
    if (found := places.get(as_id(name, "id"))) is None:
        raise BadRow("answer_missing", f"no candidate is called {name!r}")
    return found


def _grade(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise BadRow("malformed_row", f"answers: how right one is is a number above 0, got {value!r}")
    return float(value)


def _rows(location: Location, path: str, keys: tuple[str, ...]) -> Iterator[tuple[str, dict]]:
    for where, row in json_rows(location, {"path": path}):
        with _told(where):
            if isinstance(row, BadRow):
                raise row
            check_keys(row, keys, "line")
        yield where, row


@contextmanager
def _told(where: str) -> Iterator[None]:
    """A broken line is an error: a score over a mended task is no score."""
    try:
        yield
    except BadRow as error:
        raise ValueError(f"{where}: {error}") from None
