"""OBELICS and MINT-1T style Parquet: parallel lists `texts` and `images`, exactly one of the two set at each position.

Images are encoded bytes, structs that hold them, paths or data: URIs. A `source` column, where there is one, names the corpus of a row;
else the folder does.
"""

from collections.abc import Iterator

from moca_core.sources import Location
from moca_core.sources.fields import BadRow, as_list, as_text, gathered, image_if_there
from moca_core.sources.listing import folder_name, parquet_units
from moca_core.sources.rows import parquet_rows, read_rows
from moca_core.types import Content, Document, Rejected, Segment

COLUMNS = {"texts": ("texts",), "images": ("images",), "source": ("source",)}
OPTIONS = {"columns": tuple(COLUMNS), "images": ()}
list_units = parquet_units


def read_unit(location: Location, unit: dict) -> Iterator[Document | Rejected]:
    path = unit["path"]

    def document(row: dict) -> Document:
        content = interleaved(row["texts"], row["images"], location, path)
        return Document(as_text(row["source"], "source") or folder_name(path), content)

    return read_rows(parquet_rows(location, unit, COLUMNS, optional=("source",)), document)


def interleaved(texts: object, images: object, location: Location, path: str) -> Content:
    """The content of two parallel lists. Raises BadRow."""
    texts, images = as_list(texts, "texts"), as_list(images, "images")
    if len(texts) != len(images) or any((t is None) == (i is None) for t, i in zip(texts, images, strict=True)):
        detail = f"{len(texts)} texts and {len(images)} images; each position needs exactly one of the two"
        raise BadRow("texts_images_mismatch", detail)
    return gathered(
        Segment(text=as_text(text, "texts"))
        if image is None
        else Segment(image=image_if_there(image, "images", location, path))
        for text, image in zip(texts, images, strict=True)
    )
