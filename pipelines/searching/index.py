"""An index on a local folder: entries with their vectors, a faiss index, and index.json, which names both and is written last.

What a killed or refused run has embedded lies in `parts`, whole files in each, and the next run takes it over. What of a file cannot
be used is kept as its entries are: a file that is not read again still counts with all that is in it.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from cluster import storage
from moca_core.benchmarks import PROMPTS
from moca_core.data.image_files import ImageBounds
from moca_core.data.schema import REJECTED, rejected_to_table
from moca_core.folder import model_digest
from moca_core.types import Rejected
from pipelines.rejections import check_rejected
from pipelines.searching import nearest
from pipelines.searching.documents import Entry, File, list_documents, read_entries
from pipelines.tables import batched, read_table, table_writer

BATCH = 64  # entries embedded at once: they hold pictures
PART_ROWS = 256
ROWS_PER_GROUP = 16
MANIFEST = "index.json"
REJECTIONS = "rejected.parquet"
REJECTIONS_OF_PARTS = "rejected.json"
OWN = ("entries-*.parquet", "nearest-*.faiss", "parts-*", f"{storage.UNFINISHED}*")


@dataclass(frozen=True)
class Manifest:
    """What an index is of, and where it lies. `files` are {path below the folder: key of its entries}, `rejected` by that key."""

    folder: str
    model: str
    model_digest: str
    number: int
    files: dict[str, str]
    prompts: str = "none"
    rejected: dict[str, list[Rejected]] = field(default_factory=dict)

    @property
    def entries(self) -> str:
        return f"entries-{self.number}.parquet"

    @property
    def nearest(self) -> str:
        return f"nearest-{self.number}.faiss"


def read_manifest(index: str) -> Manifest | None:
    """None where there is no index yet. Raises ValueError for a folder that holds other things."""
    path = Path(index) / MANIFEST
    if path.is_file():
        stored = json.loads(path.read_text())
        return Manifest(**stored | {"rejected": _rejected_from(stored.get("rejected", {}))})
    begun = path.parent.iterdir() if path.parent.exists() else ()
    if not all(any(map(found.match, (*OWN, REJECTIONS))) for found in begun):
        raise ValueError(f"{index} is no index, and not empty: name another place")
    return None


@dataclass(frozen=True)
class Updated:
    """What an update did, in numbers of entries and of files."""

    entries: int
    embedded: int
    files: int
    removed: int
    rejected: dict[str, int]


def update(
    index: str,
    folder: str,
    model: str,
    *,
    prompts: str,
    max_rejected_fraction: float,
    progress: Callable[[Iterable], Iterable],
) -> Updated:
    """Makes the index at `index` that of the files that `folder` now holds; what it knows already is not embedded again.

    Raises ValueError for an index that is of another model or other prompts, and where too much cannot be used: then the index
    stays as it was.
    """
    before = read_manifest(index)
    digest = model_digest(model)
    if before and before.model_digest != digest:
        raise ValueError(
            f"{index} is of another model ({before.model}): give that one, or another --out, or delete the index"
        )
    if before and before.prompts != prompts:
        raise ValueError(
            f"{index} was made with --prompts {before.prompts}: give them again, or another --out, or delete the index"
        )
    found = list(list_documents(folder))
    files = [file for file in found if isinstance(file, File)]
    rows = Rows(index, before, digest, prompts)
    embedded = _embed_new(rows, folder, model, prompts, files, progress)
    living = {file.path: file.key for file in files}
    paths = {key: path for path, key in living.items()}
    table = rows.of(set(paths))
    within = {key: rows.rejected[key] for key in paths if key in rows.rejected}
    rejected = [item for item in found if isinstance(item, Rejected)]
    for key, items in within.items():
        rejected += [replace(item, where=f"{paths[key]} {item.where}".rstrip()) for item in items]
    counts = Counter(item.reason for item in rejected)
    with table_writer(str(Path(index) / REJECTIONS), REJECTED, None) as writer:
        writer.write(rejected_to_table(rejected))
    check_rejected(f"index, see {index}/{REJECTIONS}", table.num_rows, counts, max_rejected_fraction)
    number = before.number + 1 if before else 1
    manifest = Manifest(
        str(Path(folder).resolve()), str(Path(model).resolve()), digest, number, living, prompts, within
    )
    _write(index, manifest, table)
    removed = len(set(before.files) - set(living)) if before else 0
    return Updated(table.num_rows, embedded, len(living), removed, dict(counts))


class Rows:
    """The entries that are embedded, and {key: what was rejected}: of the index, and in parts of runs that did not end."""

    def __init__(self, index: str, manifest: Manifest | None, digest: str, prompts: str) -> None:
        self.folder = Path(index) / f"parts-{digest[:16]}-{prompts}"
        self.uris = [str(Path(index) / manifest.entries)] if manifest else []
        self.uris += [str(path) for path in sorted(self.folder.glob("part-*.parquet"))]
        self.keys = {key for uri in self.uris for key in read_table(uri, columns=["key"])["key"].to_pylist()}
        beside = self.folder / REJECTIONS_OF_PARTS
        self.rejected = dict(manifest.rejected) if manifest else {}
        self.rejected |= _rejected_from(json.loads(beside.read_text())) if beside.exists() else {}

    def add(self, rows: list[dict], dimension: int) -> None:
        # Before the entries: of a file that has only this it is read again, and replaced.
        storage.write_atomic(str(self.folder / REJECTIONS_OF_PARTS), json.dumps(self.rejected, default=vars).encode())
        uri = str(self.folder / f"part-{len(self.uris):06d}.parquet")
        with table_writer(uri, schema(dimension), None) as writer:
            writer.write(pa.Table.from_pylist(rows, schema=schema(dimension)))
        self.uris.append(uri)

    def of(self, keys: set[str]) -> pa.Table:
        """The rows of these keys, once each, also where a run was killed after its index was written, with its parts still there."""
        tables, left = [], set(keys)
        for uri in self.uris:
            tables.append(read_table(uri, filters=pa.compute.field("key").isin(pa.array(left, pa.string()))))
            left.difference_update(tables[-1]["key"].to_pylist())
        return pa.concat_tables(tables) if tables else schema(1).empty_table()


def schema(dimension: int) -> pa.Schema:
    return pa.schema(
        [
            ("key", pa.string()),
            ("number", pa.int32()),
            ("kind", pa.string()),
            ("snippet", pa.string()),
            ("has_picture", pa.bool_()),
            ("picture", pa.binary()),
            ("vector", pa.list_(pa.float32(), dimension)),
        ]
    )


def _rejected_from(stored: dict[str, list[dict[str, str]]]) -> dict[str, list[Rejected]]:
    return {key: [Rejected(**item) for item in items] for key, items in stored.items()}


def _embed_new(
    rows: Rows,
    folder: str,
    model: str,
    prompts: str,
    files: list[File],
    progress: Callable,
) -> int:
    """Embeds the entries of files that no row is of, each content once; their number."""
    new = list({file.key: file for file in files if file.key not in rows.keys}.values())
    if not new:
        return 0
    from moca_core.embedder import Embedder

    embedder = Embedder(model)
    embedded, held = 0, []
    for batch in batched(_entries(folder, progress(new), embedder, rows.rejected), BATCH):
        vectors = embedder.encode([PROMPTS[prompts].put(entry.content, query=False) for entry, _ in batch])
        if not np.isfinite(vectors).all():
            raise ValueError(f"{model}: its vectors hold NaN or infinity")
        for (entry, last), vector in zip(batch, vectors, strict=True):
            held.append(entry.row() | {"vector": vector})
            embedded += 1
            if last and len(held) >= PART_ROWS:
                rows.add(held, embedder.dimension)
                held = []
    if held:
        rows.add(held, embedder.dimension)
    return embedded


def _entries(
    folder: str, files: Iterable[File], embedder, rejected: dict[str, list[Rejected]]
) -> Iterator[tuple[Entry, bool]]:
    """The entries of files, each with whether it is the last one of its file; what cannot be used goes to `rejected`."""
    for file in files:
        waiting = None
        rejected.pop(file.key, None)
        for item in read_entries(folder, file, embedder.renderer, ImageBounds()):
            if isinstance(item, Rejected):
                rejected.setdefault(file.key, []).append(item)
                continue
            if waiting:
                yield waiting, False
            waiting = item
        if waiting:
            yield waiting, True


def _write(index: str, manifest: Manifest, table: pa.Table) -> None:
    import faiss

    dimension = table.schema.field("vector").type.list_size
    with table_writer(str(Path(index) / manifest.entries), schema(dimension), ROWS_PER_GROUP) as writer:
        for start in range(0, table.num_rows, 1024):
            writer.write(table.slice(start, 1024))
    vectors = table["vector"].combine_chunks().flatten().to_numpy().reshape(-1, dimension)
    faiss.write_index(nearest.build(vectors), str(Path(index) / manifest.nearest))
    storage.write_atomic(str(Path(index) / MANIFEST), json.dumps(asdict(manifest), indent=1).encode())
    for path in [found for pattern in OWN for found in Path(index).glob(pattern)]:
        if path.name not in (manifest.entries, manifest.nearest):
            storage.delete(str(path))
