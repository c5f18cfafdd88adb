"""The layout of the MoCa authors' own corpora: `text` with one placeholder per image, and `images`, their encoded bytes."""

from collections.abc import Iterator

import pyarrow.fs as pafs

from moca_core.sources.listing import find_files, folder_name, parquet_rows
from moca_core.types import Document, Rejected, Segment

PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"  # a literal of this layout, whatever the backbone


def list_units(fs: pafs.FileSystem, path: str) -> list[dict]:
    return find_files(fs, path, ".parquet")


def read_unit(fs: pafs.FileSystem, unit: dict) -> Iterator[Document | Rejected]:
    path = unit["path"]
    source = folder_name(path)
    for number, row in enumerate(parquet_rows(fs, path, ["text", "images"])):
        texts, images = (row["text"] or "").split(PLACEHOLDER), row["images"] or []
        if len(images) != len(texts) - 1:
            reason = "too_few_images" if len(images) < len(texts) - 1 else "too_many_images"
            yield Rejected(reason, f"{len(texts) - 1} placeholders, {len(images)} images", f"{path} row {number}")
            continue
        segments = [Segment(text=texts[0])]
        for image, text in zip(images, texts[1:], strict=True):
            segments += [Segment(image=image or b""), Segment(text=text)]
        yield Document(source, tuple(s for s in segments if s.text != ""))
