"""The vectors of the inputs, share by share and part by part: what is finished stays finished, whenever the process dies.

A share is a run of neighbouring units. Its parts lie in a folder of its own, each complete or invisible; the metadata of a part say where
the reading goes on behind it. What was rejected on the way lies beside it, written before.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from moca_core.benchmarks import PROMPTS
from moca_core.data.image_files import ImageBounds
from moca_core.data.schema import REJECTED, rejected_to_table
from moca_core.types import Document, Rejected
from pipelines.embedding.inputs import checked, read_input
from pipelines.rejections import rejected_rows
from pipelines.tables import table_writer

SHARES = 64  # at most: so many can be worked on side by side
PART_ROWS = 128  # vectors of a part: what a killed run may have to embed again

Place = tuple[int, int]
"""A unit of a share, and how many of its items were read."""


@dataclass(frozen=True)
class Job:
    """What is embedded by which model; `uri` is the folder of the parts. `prompts` names some of PROMPTS, put before queries or beside
    what is found."""

    model: str
    max_tokens: int | None
    units: list[dict]
    columns: dict[str, str]
    uri: str
    prompts: str = "none"
    queries: bool = False

    def shares(self) -> list[list[dict]]:
        count = min(SHARES, len(self.units))
        return [self.units[len(self.units) * n // count : len(self.units) * (n + 1) // count] for n in range(count)]

    def folder(self, share: int) -> str:
        return storage.join(self.uri, f"share-{share:02d}")

    def parts(self, share: int) -> list[str]:
        folder = self.folder(share)
        return [storage.join(folder, name) for name, _ in storage.list_files(folder) if name.startswith("part-")]


@dataclass(frozen=True)
class Part:
    """What is known of a part: `next` is None behind the last one of a share."""

    rows: int
    rejected: dict[str, int]
    next: Place | None

    @staticmethod
    def read(uri: str) -> "Part":
        fs, path = storage.filesystem(uri)
        with fs.open_input_file(path) as source:
            metadata = pq.read_metadata(source)
        found = json.loads(metadata.metadata[b"part"])
        return Part(metadata.num_rows, found["rejected"], found["next"] and tuple(found["next"]))


class Embed:
    """Called with the number of a share, embeds what is left of it. In a process of a pool, or alone; the model is loaded when needed.

    `tell` is given the numbers of items that were embedded and rejected just now, or long ago.
    """

    def __init__(self, job: Job, tell: Callable[[int, int], object] = lambda embedded, rejected: None) -> None:
        self.job, self.tell = job, tell

    @cached_property
    def embedder(self):
        from moca_core.embedder import Embedder

        return Embedder(storage.localize(self.job.model), max_tokens=self.job.max_tokens)

    def __call__(self, share: int) -> dict:
        parts = [Part.read(uri) for uri in self.job.parts(share)]
        for part in parts:
            self.tell(part.rows, sum(rejected_rows(part.rejected).values()))
        place = parts[-1].next if parts else (0, 0)
        number = len(parts)
        while place is not None:
            place = self.write_part(share, number, place)
            number += 1
        return {}

    def write_part(self, share: int, number: int, place: Place) -> Place | None:
        """The next PART_ROWS contents from `place` on; where the one behind them begins."""
        documents: list[Document] = []
        rejected: list[Rejected] = []
        following: Place | None = None
        for behind, item in read_from(self.job.shares()[share], place, self.job.columns):
            for found in checked(item, ImageBounds()):
                (rejected if isinstance(found, Rejected) else documents).append(found)
            if len(documents) == PART_ROWS:
                following = behind
                break
        prompts = PROMPTS[self.job.prompts]
        contents = [prompts.put(document.content, query=self.job.queries) for document in documents]
        vectors = self.embedder.encode(contents)
        if not np.isfinite(vectors).all():
            raise ValueError(f"{self.job.model}: its vectors hold NaN or infinity")
        counts = Counter(item.reason for item in rejected)
        folder = self.job.folder(share)
        if rejected:
            with table_writer(storage.join(folder, f"rejected-{number:05d}.parquet"), REJECTED, None) as writer:
                writer.write(rejected_to_table(rejected))
        about = json.dumps({"rejected": counts, "next": following})
        schema = vectors_schema(self.embedder.dimension).with_metadata({"part": about})
        with table_writer(storage.join(folder, f"part-{number:05d}.parquet"), schema, None) as writer:
            writer.write(vectors_table([document.where for document in documents], vectors).cast(schema))
        self.tell(len(documents), sum(rejected_rows(counts).values()))
        return following


def read_from(units: list[dict], place: Place, columns: dict[str, str]) -> Iterator[tuple[Place, Document | Rejected]]:
    """The items from `place` on, each with the place behind it."""
    first, skipped = place
    for number, unit in enumerate(units[first:], first):
        done = skipped if number == first else 0
        for count, item in enumerate(islice(read_input(unit, columns), done, None), done + 1):
            yield (number, count), item


def vectors_schema(dimension: int) -> pa.Schema:
    return pa.schema([("item", pa.string()), ("vector", pa.list_(pa.float32(), dimension))])


def vectors_table(names: list[str], vectors: np.ndarray) -> pa.Table:
    """vectors: [N, D]."""
    dimension = vectors.shape[1]
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1), pa.float32()), dimension)
    return pa.Table.from_arrays([pa.array(names, pa.string()), column], schema=vectors_schema(dimension))
