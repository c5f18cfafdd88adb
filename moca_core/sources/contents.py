"""Tables of what is to be embedded: Parquet or JSON lines, in a row a text, an image or both (the image first), or a `content`.

A `content` is a text, {"text": ..., "image": ...}, or a list of {"text": ...} and {"image": ...} in reading order. An image is
bytes, a struct that holds them, a path, or a data: URI. Parquet with parallel lists `texts` and `images` is read as in
sources/obelics.py. The column `name`, where one is named, is what a row is called.
"""

from collections.abc import Iterator
from typing import Any

from moca_core.sources import Location, obelics
from moca_core.sources.captions import COLUMNS as CAPTIONS
from moca_core.sources.fields import BadRow, as_text, gathered, image_if_there
from moca_core.sources.listing import folder_name
from moca_core.sources.pairing import table_rows, table_units
from moca_core.sources.rows import read_rows
from moca_core.types import Content, Document, Rejected, Segment

COLUMNS = {
    "content": ("content",),
    "texts": ("texts",),
    "images": ("images",),
    "image": CAPTIONS["image"],
    "text": ("text", "caption", "raw_content", "markdown", "body"),
    "name": (),
}
OPTIONS = {"columns": tuple(COLUMNS), "images": ()}
list_units = table_units


def read_unit(location: Location, unit: dict) -> Iterator[Document | Rejected]:
    path = unit["path"]

    def document(row: dict) -> Document:
        if row["texts"] is not None:
            return Document(folder_name(path), obelics.interleaved(row["texts"], row["images"], location, path))
        return Document(folder_name(path), _content(row, location, path))

    return read_rows(_named(table_rows(location, unit, COLUMNS, optional=tuple(COLUMNS))), document)


def _named(rows: Iterator[tuple[str, dict | BadRow]]) -> Iterator[tuple[str, dict | BadRow]]:
    for where, row in rows:
        named = isinstance(row, dict) and row["name"] is not None
        yield (str(row["name"]) if named else where), row


def _content(row: dict, location: Location, path: str) -> Content:
    value = row["content"]
    if value is None:
        value = {role: row[role] for role in ("image", "text") if row[role] is not None}
    if isinstance(value, str):
        return (Segment(text=as_text(value, "content")),)
    parts = value if isinstance(value, list) else [value]
    return gathered(segment for part in parts for segment in _part(part, location, path))


def _part(part: Any, location: Location, path: str) -> Iterator[Segment]:
    """The image, then the text, of one of the parts of a content. Raises BadRow."""
    if not isinstance(part, dict):
        raise BadRow("malformed_row", f"content: parts with text or image were expected, got {str(part)[:60]!r}")
    image, text = part.get("image"), part.get("text")
    if image is None and text is None:
        raise BadRow("empty", f"none of the columns {', '.join(COLUMNS)} holds anything, or there is none of them")
    if image is not None:
        yield Segment(image=image_if_there(image, "image", location, path))
    if text is not None:
        yield Segment(text=as_text(text, "text"))
