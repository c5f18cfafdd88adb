"""The files of BEIR folders: which belong together, what the judgments say, and how many units the training pairs make."""

import math
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moca_core.sources import Location
from moca_core.sources.fields import BadRow, as_text
from moca_core.sources.listing import PACKED, find_files, row_group_units
from moca_core.sources.pairing import LINE_FILES, file_rows
from moca_core.sources.rows import broken_data, unpacked

PARTS = ("corpus", "queries", "qrels")
KINDS = ("tsv", "jsonl", "parquet")  # of a part that is there twice, the first
SPLITS = ("train", "test", "dev", "validation")
FILE = re.compile(
    rf"(?:(?P<root>.*)/)?(?P<part>{'|'.join(PARTS)})(?P<name>/.+)?\.(?P<kind>{'|'.join(KINDS)})(\.gz|\.zst)?"
)
QRELS = {
    "query_id": ("query-id", "query_id"),
    "corpus_id": ("corpus-id", "corpus_id"),
    "score": ("score",),
}
HELD_BYTES = (
    256 * 2**20
)  # of answers that a unit of training pairs keeps, as they are stored; in memory texts take twice that
SAMPLE_BYTES = 2**22
MAX_LINE_BYTES = 2**16  # three short fields; what is longer is read in pieces, none of which is a judgment


@dataclass(frozen=True)
class File:
    path: str
    size: int
    kind: str
    split: str | None  # that its name begins with


@dataclass(frozen=True)
class Dataset:
    """One folder with corpus, queries and qrels; `name` is its path below the source, or its own name."""

    name: str
    files: dict[str, list[File]]

    def qrels(self, split: str) -> list[File]:
        return _one_kind([file for file in self.files["qrels"] if file.split == split])

    def rows_for(self, part: str, split: str) -> list[File]:
        """Files of the corpus or the queries: those of the split, where files say so, else all."""
        files = self.files[part]
        return _one_kind([file for file in files if file.split == split] or files)


def datasets(location: Location) -> list[Dataset]:
    """Every folder that has all three parts. Raises ValueError where there is none."""
    found: dict[str, dict[str, list[File]]] = {}
    for path, size in find_files(location, ".parquet", ".tsv", ".tsv.gz", ".tsv.zst", *LINE_FILES):
        if match := FILE.fullmatch(path):
            split = re.match(rf"/({'|'.join(SPLITS)})\b", match["name"] or "")
            file = File(path, size, match["kind"], split[1] if split else None)
            found.setdefault(match["root"] or "", {}).setdefault(match["part"], []).append(file)
    whole = [Dataset(_name(location.path, root), files) for root, files in found.items() if len(files) == len(PARTS)]
    if not whole:
        raise ValueError(f"{location.path}: no folder with {', '.join(PARTS)} there")
    return whole


def _name(top: str, root: str) -> str:
    below = root.removeprefix(top.rstrip("/") + "/")
    return below if below != root else root.rsplit("/", 1)[-1]


def _one_kind(files: list[File]) -> list[File]:
    return next((same for kind in KINDS if (same := [file for file in files if file.kind == kind])), [])


def as_id(value: Any, role: str) -> str:
    """An id as text, whether it is stored as text or as a number. Raises BadRow for anything else, and for an empty one."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not (text := as_text(value, role)):
        raise BadRow("malformed_row", f"{role}: an id was expected, got {value!r}")
    return text


def judgments(location: Location, path: str) -> Iterator[tuple[str, tuple[str, str, float] | BadRow]]:
    """(where, (query id, document id, score)) of a file of qrels."""
    tsv = re.search(r"\.tsv(\.gz|\.zst)?$", path)
    for where, row in _tsv_rows(location, path) if tsv else file_rows(location, path, QRELS):
        try:
            if isinstance(row, BadRow):
                raise row
            query, document = as_id(row["query_id"], "query-id"), as_id(row["corpus_id"], "corpus-id")
            yield where, (query, document, _score(row["score"]))
        except BadRow as error:
            yield where, error


def _score(value: Any) -> float:
    try:
        score = math.nan if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    if math.isnan(score):
        raise BadRow("malformed_row", f"score: a number was expected, got {str(value)[:60]!r}")
    return score


def _tsv_rows(location: Location, path: str) -> Iterator[tuple[str, dict | BadRow]]:
    """Lines of query, document and score; TREC's four columns too. The header that the layout asks for is passed over."""
    number = 0
    try:
        with location.fs.open_input_file(path) as raw, broken_data():
            lines = unpacked(raw, path)
            while line := lines.readline(MAX_LINE_BYTES):
                number += 1
                row = _tsv_row(line)
                header = number == 1 and isinstance(row, dict) and not re.search(r"\d", row["score"])
                if line.strip() and not header:
                    yield f"{path} line {number}", row
    except BadRow as error:
        yield f"{path} after line {number}", error


def _tsv_row(line: bytes) -> dict | BadRow:
    try:
        fields = line.decode("utf-8-sig").rstrip("\r\n").split("\t")
    except UnicodeDecodeError as error:
        return BadRow("malformed_text", f"{error} in {line[:60]!r}")
    if len(fields) not in (3, 4):
        return BadRow("malformed_row", f"query, document and score between tabs were expected, got {line[:60]!r}")
    return {"query_id": fields[0], "corpus_id": fields[-2], "score": fields[-1]}


def share_of(query_id: str, parts: int) -> int:
    """The unit that a query belongs to: the same on every machine."""
    return zlib.crc32(query_id.encode()) % parts


def count_parts(location: Location, corpus: list[File], qrels: list[File]) -> int:
    """Into how many units the queries are cut, so that each keeps about `HELD_BYTES` of answers in memory.

    What all units keep is one row of the corpus for every judgment at most. Cutting finer has a price: every unit passes
    once over the corpus.
    """
    rows, size = _rows_and_bytes(location, corpus)
    judged, _ = _rows_and_bytes(location, qrels)
    return max(1, math.ceil(min(judged / max(rows, 1), 1) * size / HELD_BYTES))


def _rows_and_bytes(location: Location, files: list[File]) -> tuple[float, float]:
    """About how many rows these hold, and how many bytes unpacked: from their footers, or from the beginning of the first."""
    size = sum(file.size for file in files)
    if files[0].kind == "parquet":
        return sum(unit["rows"] for unit in row_group_units(location.fs, [file.path for file in files])), size
    try:
        with location.fs.open_input_file(files[0].path) as raw, broken_data():
            lines = unpacked(raw, files[0].path)
            sample = lines.read(SAMPLE_BYTES)
            read = raw.tell() if files[0].path.lower().endswith(PACKED) else len(sample)  # of the file itself
    except BadRow:
        return 1, size  # reading it all will say what is broken
    scale = size / max(read, 1)
    return scale * max(sample.count(b"\n"), 1), scale * len(sample)
