"""OBELICS and MINT-1T style Parquet: parallel lists `texts` and `images`, exactly one of the two set at each position.

Images are encoded bytes. A `source` column, where there is one, names the corpus of a row; else the folder does.
"""

from collections.abc import Iterator

import pyarrow.fs as pafs

from moca_core.sources.listing import find_files, folder_name, parquet_rows
from moca_core.types import Document, Rejected, Segment


def list_units(fs: pafs.FileSystem, path: str) -> list[dict]:
    return find_files(fs, path, ".parquet")


def read_unit(fs: pafs.FileSystem, unit: dict) -> Iterator[Document | Rejected]:
    path = unit["path"]
    for number, row in enumerate(parquet_rows(fs, path, ["texts", "images"], optional=("source",))):
        texts, images = row["texts"] or [], row["images"] or []
        if len(texts) != len(images) or any((t is None) == (i is None) for t, i in zip(texts, images, strict=True)):
            detail = f"{len(texts)} texts and {len(images)} images; each position needs exactly one of the two"
            yield Rejected("texts_images_mismatch", detail, f"{path} row {number}")
            continue
        segments = (Segment(text=t, image=i) for t, i in zip(texts, images, strict=True))
        yield Document(row.get("source") or folder_name(path), tuple(s for s in segments if s.text != ""))
