"""Files in public layouts, written for a test, and what an adapter makes of them."""

import gzip
import json

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from moca_core.sources import Location
from moca_core.types import Rejected

FS = pafs.LocalFileSystem()


def at(path, **options):
    return Location(FS, str(path), **options)


def parquet(path, rows, schema=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, **options)
    return path


def lines(path, rows):
    """JSON lines, packed as the name says; a row that is bytes is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)
    packed = {".gz": gzip.compress, ".zst": lambda d: pa.compress(d, "zstd", asbytes=True)}.get(path.suffix)
    path.write_bytes(packed(data) if packed else data)
    return path


def read(adapter, path, **options):
    location = at(path, **options)
    return [item for unit in adapter.list_units(location) for item in adapter.read_pairs(location, unit)]


def reasons(items):
    return [i.reason if isinstance(i, Rejected) else None for i in items]


def said(pair):
    """The texts of a pair: query, right answers, wrong ones."""
    texts = [["".join(s.text or "*" for s in side) for side in sides] for sides in (pair.positives, pair.negatives)]
    return ("".join(s.text or "*" for s in pair.query), *texts)
