"""Pairs as JSON lines, the plain format for one's own: {"query": SIDE, "positive": SIDE, "negatives": [SIDE, ...]}.

A SIDE is a text, {"text": ..., "image": path} (the image first) or a list of {"text": ...} and {"image": ...} in reading order. An
image is a path or a data: URI. `positives` in place of `positive` lists several right answers; `task` names the task (default:
folder and file), `group` the answer, where different contents are the same one. Any other key is an error.
"""

import re
from collections.abc import Iterator
from typing import Any

from moca_core.sources import Location
from moca_core.sources.fields import BadRow, as_image, as_list, as_text, gathered
from moca_core.sources.listing import line_units
from moca_core.sources.pairing import LINES, pair_of, task_name
from moca_core.sources.rows import json_rows, read_rows
from moca_core.types import Content, Pair, Rejected, Segment

KEYS = ("query", "positive", "positives", "negatives", "task", "group")
SIDE_KEYS = ("image", "text")  # in the order in which a side is read that has both
TASK = re.compile(r"[\w-][\w. -]*(/[\w-][\w. -]*)*")  # it becomes a path: no part of it may lead elsewhere
DATA_URI = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)
OPTIONS = {"images": ()}


def list_units(location: Location) -> list[dict]:
    return line_units(location, LINES)


def read_pairs(location: Location, unit: dict) -> Iterator[Pair | Rejected]:
    path = unit["path"]
    default_task = task_name(path)

    def pair(row: dict) -> Pair:
        check_keys(row, KEYS, "row")
        if "query" not in row or ("positive" in row) == ("positives" in row):
            raise BadRow(
                "malformed_row", f"'query' and one of 'positive' and 'positives' are needed; it has {_names(row)}"
            )
        positives = as_list(row["positives"], "positives") if "positives" in row else [row["positive"]]
        return pair_of(
            _task(row["task"]) if row.get("task") is not None else default_task,
            side(location, path, row["query"], "query"),
            (side(location, path, value, "positive") for value in positives),
            (side(location, path, value, "negatives") for value in as_list(row.get("negatives"), "negatives")),
            as_text(row.get("group"), "group") or None,
        )

    return read_rows(json_rows(location, unit), pair)


def side(location: Location, path: str, value: Any, role: str) -> Content:
    """One side of a pair. Raises BadRow for anything that is none."""
    if isinstance(value, str):
        return (Segment(text=as_text(value, role)),)
    if isinstance(value, dict):
        check_keys(value, SIDE_KEYS, role)
        value = [{key: value[key]} for key in SIDE_KEYS if value.get(key) is not None]
    if not isinstance(value, list) or not value:
        raise BadRow(
            "malformed_row", f"{role}: a text, an object or a list of objects is needed, got {str(value)[:60]!r}"
        )
    return gathered(_segment(location, path, part, role) for part in value)


def _segment(location: Location, path: str, part: Any, role: str) -> Segment:
    if not isinstance(part, dict) or len(part) != 1:
        raise BadRow(
            "malformed_row", f'{role}: a list holds {{"text": ...}} and {{"image": ...}}, got {str(part)[:60]!r}'
        )
    check_keys(part, SIDE_KEYS, role)
    if "text" in part:
        return Segment(text=as_text(part["text"], role))
    name = as_text(part["image"], f"{role} image")
    if not name or (name[:5].lower() == "data:" and not DATA_URI.match(name)):
        raise BadRow("malformed_row", f"{role}: an image needs a path or a base64 data: URI, got {name[:60]!r}")
    return Segment(image=as_image(name, role, location, path))


def _task(value: Any) -> str:
    name = as_text(value, "task")
    if not TASK.fullmatch(name):
        raise BadRow(
            "malformed_row", f"task {name[:60]!r}: letters, digits, '-', '_', '.' and ' ', with '/' between parts"
        )
    return name


def check_keys(given: dict, known: tuple[str, ...], role: str) -> None:
    """Raises BadRow for a key that is none of those: a typo must not go unseen."""
    if unknown := [key for key in given if key not in known]:
        raise BadRow("unknown_key", f"{role}: {_names(unknown)}; there are {', '.join(known)}")


def _names(keys: Any) -> str:
    return ", ".join(map(repr, keys))[:200]
