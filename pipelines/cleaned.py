"""The cleaned corpus, one row group at a time: the documents of the Corpus without what the cleaning took out."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import pyarrow.compute as pc

from cluster import storage
from moca_core.data.duplicates import WHOLE
from moca_core.data.schema import table_to_documents
from moca_core.data.validate import is_empty
from moca_core.types import Document
from pipelines.runner.record import Artifact
from pipelines.tables import open_table, read_table


@dataclass(frozen=True)
class Group:
    """A row group of the Corpus: `documents` of it count, from `first_row` of its part on."""

    part: int
    group: int
    source: int
    first_row: int
    documents: int
    bytes: int


@dataclass(frozen=True)
class CleanedCorpus:
    """Where a Corpus lies, and what was taken out of it."""

    corpus_uri: str
    clean_uri: str
    dropped: tuple[str, ...]

    @classmethod
    def of(cls, corpus: Artifact, clean: Artifact) -> "CleanedCorpus":
        return cls(corpus.uri, clean.uri, tuple(clean.result["dropped"]))

    def groups(self) -> list[Group]:
        return [Group(**row) for row in read_table(storage.join(self.corpus_uri, "groups.parquet")).to_pylist()]

    def dropped_documents(self) -> int:
        """How many documents were taken out as a whole."""
        whole = [
            read_table(storage.join(self.clean_uri, name), ["part", "row"], pc.field("segment") == WHOLE)
            for name in self.dropped
        ]
        return len({(row["part"], row["row"]) for table in whole for row in table.to_pylist()})

    def read(self, group: Group) -> Iterator[Document]:
        """What is left of the group's documents."""
        gone = {name: _dropped_of(storage.join(self.clean_uri, name), group.part) for name in self.dropped}
        file = open_table(storage.join(self.corpus_uri, f"documents/part-{group.part:05d}.parquet"))
        table = file.read_row_group(group.group).slice(0, group.documents)
        for row, document in enumerate(table_to_documents(table), group.first_row):
            places = set().union(*(dropped.get(row, ()) for dropped in gone.values()))
            if WHOLE in places:
                continue
            left = tuple(segment for place, segment in enumerate(document.content) if place not in places)
            if not is_empty(left):
                yield replace(document, content=left) if places else document


@lru_cache(maxsize=256)
def _dropped_of(uri: str, part: int) -> dict[int, set[int]]:
    """{row: the places taken out of it} of one part."""
    found: dict[int, set[int]] = {}
    table = read_table(uri, columns=["row", "segment"], filters=pc.field("part") == part)
    for row in table.to_pylist():
        found.setdefault(row["row"], set()).add(row["segment"])
    return found
