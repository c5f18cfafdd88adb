"""The layout of the MoCa authors' own corpora: `text` with one placeholder per image, and `images`, their encoded bytes."""

from collections.abc import Iterator

from moca_core.sources import Location
from moca_core.sources.fields import BadRow, as_list, as_text, gathered, image_if_there
from moca_core.sources.listing import folder_name, parquet_units
from moca_core.sources.rows import parquet_rows, read_rows
from moca_core.types import Document, Rejected, Segment

PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"  # a literal of this layout, whatever the backbone
COLUMNS = {"text": ("text",), "images": ("images",)}
OPTIONS = {"columns": tuple(COLUMNS), "images": ()}
list_units = parquet_units


def read_unit(location: Location, unit: dict) -> Iterator[Document | Rejected]:
    path = unit["path"]

    def segments(texts: list[str], images: list) -> Iterator[Segment]:
        yield Segment(text=texts[0])
        for image, text in zip(images, texts[1:], strict=True):
            yield Segment(image=image_if_there(image, "images", location, path))
            yield Segment(text=text)

    def document(row: dict) -> Document:
        texts, images = as_text(row["text"], "text").split(PLACEHOLDER), as_list(row["images"], "images")
        if len(images) != len(texts) - 1:
            reason = "too_few_images" if len(images) < len(texts) - 1 else "too_many_images"
            raise BadRow(reason, f"{len(texts) - 1} placeholders, {len(images)} images")
        return Document(folder_name(path), gathered(segments(texts, images)))

    return read_rows(parquet_rows(location, unit, COLUMNS), document)
