"""Caption tables (PixelProse, img2dataset's Parquet): an image and a text that describes it. As a document: the image, then the text.

The image is encoded bytes, a struct that holds them, a path or a data: URI. A table of URLs alone has no images: download it first,
for instance with img2dataset.
"""

from collections.abc import Iterator

from moca_core.sources import Location
from moca_core.sources.fields import as_text, image_if_there
from moca_core.sources.listing import folder_name, parquet_units
from moca_core.sources.rows import parquet_rows, read_rows
from moca_core.types import Document, Rejected, Segment

COLUMNS = {
    "image": ("image", "jpg", "jpeg", "png", "webp", "image_bytes", "image_path", "file_name", "image_file"),
    "text": ("vlm_caption", "caption", "recaption", "text", "txt", "description", "alt_text"),
}
OPTIONS = {"columns": tuple(COLUMNS), "images": ()}
list_units = parquet_units


def read_unit(location: Location, unit: dict) -> Iterator[Document | Rejected]:
    path = unit["path"]

    def document(row: dict) -> Document:
        image, text = image_if_there(row["image"], "image", location, path), as_text(row["text"], "text")
        return Document(folder_name(path), (Segment(image=image), *([Segment(text=text)] if text else [])))

    return read_rows(parquet_rows(location, unit, COLUMNS), document)
