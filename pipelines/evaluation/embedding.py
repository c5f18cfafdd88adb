"""Embedding what tasks ask and offer, once: vectors are kept by what was embedded, how, and by which model, never by where it lies.

    vectors/SPACE/NAME.parquet      ids and vectors of one unit

A space is a model, its settings and a prompt; an id is the hash of a content. So a second run, or another task with the same candidates,
finds what it needs and embeds the rest, and a run that was killed goes on behind the units that it finished.
"""

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from cluster import storage
from moca_core.benchmarks import Prompts
from moca_core.data.schema import rows_to_content
from moca_core.types import Attention
from pipelines.evaluation.tasks import ROWS_PER_GROUP, SIDES, StoredTask
from pipelines.tables import read_rows, read_table, table_writer
from pipelines.vectors import ID, id_column, ids_of, read_ids, read_vectors, write_vectors

if TYPE_CHECKING:
    from moca_core.embedder import Embedder

UNIT_CONTENTS = 256
VERSION = 1  # raised by hand when the same content would get another vector
_FILES_AT_ONCE = 16

INDEX = pa.schema([("id", pa.binary(16)), ("file", pa.dictionary(pa.int32(), pa.string())), ("row", pa.int32())])


@dataclass(frozen=True)
class Reader:
    """A model, and how it reads. `digest` is of its weights and configs; `max_tokens` None: what the folder was exported with."""

    label: str
    uri: str
    digest: str
    attention: Attention
    max_tokens: int | None
    precision: str

    @property
    def key(self) -> tuple:
        """What a vector depends on beside what it is of."""
        return (VERSION, self.digest, self.max_tokens, self.precision)

    def space(self, side: str, prompts: Prompts) -> str:
        """Where vectors of that side of a task belong. Sides without a prompt share one."""
        said = (side, prompts.query if side == "queries" else prompts.image)
        identity = (*self.key, said if said[1] else ())
        return hashlib.sha256(repr(identity).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class EmbeddingUnit:
    """Rows of one side of a task whose vectors are not there yet."""

    reader: Reader
    side: str
    task: StoredTask
    rows: np.ndarray
    name: str


def missing_units(readers: Iterable[Reader], tasks: Iterable[StoredTask], vectors_uri: str) -> list[EmbeddingUnit]:
    """What is to embed, each content once a space. The units of a model stand together."""
    units: list[EmbeddingUnit] = []
    tasks = list(tasks)
    for reader in readers:
        there: dict[str, np.ndarray] = {}
        for task, side in ((task, side) for task in tasks for side in SIDES):
            space = reader.space(side, task.prompts)
            if space not in there:
                there[space] = np.unique(_index(vectors_uri, space)[0])
            ids = read_ids(task.table(side))
            firsts = np.unique(ids, return_index=True)[1]
            rows = np.sort(firsts[~np.isin(ids[firsts], there[space])])
            there[space] = np.union1d(there[space], ids[rows])
            for start in range(0, len(rows), UNIT_CONTENTS):
                part = rows[start : start + UNIT_CONTENTS]
                name = hashlib.sha256(ids[part].tobytes()).hexdigest()[:32]
                units.append(EmbeddingUnit(reader, side, task, part.astype(np.int32), f"{space}/{name}.parquet"))
    return units


class Embed:
    """In a process of the pool: vectors of a unit. The model of the last unit is kept; units of one model follow each other."""

    def __init__(self, units: list[EmbeddingUnit], vectors_uri: str) -> None:
        self.units, self.vectors_uri = units, vectors_uri
        self.embedder = lru_cache(maxsize=1)(load_embedder)

    def __call__(self, number: int) -> dict:
        unit = self.units[number]
        put = partial(unit.task.prompts.put, query=unit.side == "queries")
        rows = read_rows(unit.task.table(unit.side), unit.rows.tolist(), ROWS_PER_GROUP)
        contents = [put(rows_to_content(row["content"])) for row in rows]
        vectors = self.embedder(unit.reader.uri, unit.reader.max_tokens).encode(contents)
        if not np.isfinite(vectors).all():
            raise ValueError(
                f"evaluate: vectors of {unit.reader.label} for {unit.task.name} hold NaN or infinity, and nothing can be ranked by them"
            )
        ids = np.array([row["id"] for row in rows], ID)
        write_vectors(storage.join(self.vectors_uri, unit.name), vectors, ids)
        return {"embedded": len(rows)}


def load_embedder(uri: str, max_tokens: int | None) -> "Embedder":
    from moca_core.embedder import Embedder

    return Embedder(storage.localize(uri), max_tokens=max_tokens)


def write_index(vectors_uri: str, space: str, uri: str) -> None:
    """Writes which vectors a space holds, and where."""
    ids, files, rows = _index(vectors_uri, space)
    with table_writer(uri, INDEX, None) as writer:
        writer.write(pa.table({"id": id_column(ids), "file": files, "row": rows}, schema=INDEX))


def _index(vectors_uri: str, space: str) -> tuple[np.ndarray, pa.DictionaryArray, np.ndarray]:
    """(ids, files, rows), [N] each."""
    folder = storage.join(vectors_uri, space)
    names = [name for name, _ in storage.list_files(folder) if name.endswith(".parquet")]
    with ThreadPoolExecutor(_FILES_AT_ONCE) as threads:
        held = list(threads.map(lambda name: read_ids(storage.join(folder, name)), names))
    lengths = [len(ids) for ids in held]
    numbers = pa.array(np.repeat(np.arange(len(names), dtype=np.int32), lengths), pa.int32())
    files = pa.DictionaryArray.from_arrays(numbers, pa.array([f"{space}/{name}" for name in names], pa.string()))
    rows = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths] or [np.empty(0, np.int32)])
    return np.concatenate([*held, np.empty(0, ID)]), files, rows


@dataclass(frozen=True)
class Vectors:
    """Vectors of one side of a task as they lie: of every one the number of its file and its row there."""

    files: list[str]
    file: np.ndarray
    row: np.ndarray

    def __len__(self) -> int:
        return len(self.row)

    @staticmethod
    def find(ids: np.ndarray, index_uri: str, vectors_uri: str) -> "Vectors":
        table = read_table(index_uri).combine_chunks()
        held = ids_of(table)
        order = np.argsort(held, kind="stable")
        at = order[np.searchsorted(held, ids, sorter=order).clip(max=len(held) - 1)]
        assert (held[at] == ids).all(), f"{index_uri} lacks vectors that were to be there"
        files = table["file"].combine_chunks()
        names = [storage.join(vectors_uri, name) for name in files.dictionary.to_pylist()]
        return Vectors(names, files.indices.to_numpy()[at], table["row"].to_numpy()[at])

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(places, their vectors), file by file."""
        order = np.argsort(self.file, kind="stable")
        for places in np.split(order, np.flatnonzero(np.diff(self.file[order])) + 1):
            held = np.concatenate(list(read_vectors(self.files[self.file[places[0]]])))
            yield places, held[self.row[places]]

    def whole(self) -> np.ndarray:
        """All, in order."""
        places, vectors = zip(*self.blocks(), strict=True)
        return np.concatenate(vectors)[np.argsort(np.concatenate(places))]
