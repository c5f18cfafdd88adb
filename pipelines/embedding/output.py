"""Finished parts to the file that was asked for, whole or not at all, and what was rejected beside it."""

import json
from collections import Counter

import numpy as np

from cluster import storage
from moca_core.data.schema import REJECTED
from pipelines.embedding.shares import Job, Part, vectors_schema
from pipelines.tables import read_table, table_writer

SUFFIXES = (".parquet", ".npy")


def counts(job: Job) -> tuple[int, Counter[str]]:
    """(contents embedded, items rejected by reason) of all parts."""
    parts = [Part.read(uri) for share in range(len(job.shares())) for uri in job.parts(share)]
    return sum(part.rows for part in parts), sum((Counter(part.rejected) for part in parts), Counter())


def beside(out: str, suffix: str) -> str:
    """`out` with `suffix` in place of its own."""
    return out.rsplit(".", 1)[0] + suffix


def write_rejected(job: Job, out: str) -> None:
    """All rejections of a job as one table, or none where there is nothing."""
    folders = [job.folder(share) for share in range(len(job.shares()))]
    files = [
        storage.join(folder, name)
        for folder in folders
        for name, _ in storage.list_files(folder)
        if name.startswith("rejected-")
    ]
    target = beside(out, ".rejected.parquet")
    if not files:
        storage.delete(target)
        return
    with table_writer(target, REJECTED, None) as writer:
        for uri in files:
            writer.write(read_table(uri))


def write_vectors(job: Job, out: str) -> int:
    """The vectors of all parts, in the order of the inputs; their dimension."""
    parts = [uri for share in range(len(job.shares())) for uri in job.parts(share)]
    dimension = read_table(parts[0]).schema.field("vector").type.list_size
    if out.endswith(".npy"):
        _write_npy(parts, out, dimension)
    else:
        with table_writer(out, vectors_schema(dimension), None) as writer:
            for uri in parts:
                writer.write(read_table(uri).replace_schema_metadata())
    return dimension


def _write_npy(parts: list[str], out: str, dimension: int) -> None:
    """The vectors alone; what they are of goes beside them, a JSON string in every line."""
    rows = sum(Part.read(uri).rows for uri in parts)
    header = {"descr": "<f4", "fortran_order": False, "shape": (rows, dimension)}
    with (
        storage.open_writer(beside(out, ".names.jsonl")) as names,
        storage.open_writer(out) as file,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        for uri in parts:
            table = read_table(uri)
            names.write("".join(json.dumps(name) + "\n" for name in table["item"].to_pylist()).encode())
            file.write(table["vector"].combine_chunks().flatten().to_numpy().astype("<f4").tobytes())
