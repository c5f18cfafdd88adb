"""What the user named, as units that can be read apart from each other: texts, lines, files, folders."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from cluster import storage
from moca_core.data.image_files import ImageBounds
from moca_core.data.validate import valid_documents
from moca_core.sources import Location, files
from moca_core.types import Document, Rejected, Segment
from pipelines.tables import batched

LINES = "-"
TEXTS_PER_UNIT = 1024


def list_inputs(arguments: list[str], lines: Iterable[str]) -> list[dict]:
    """Units in the order of the arguments; `lines` are the texts that "-" stands for. Raises ValueError for a file that is not there."""
    units: list[dict] = []
    for argument in arguments:
        if argument == LINES:
            texts = (line.rstrip("\r\n") for line in lines)
            units += [{"texts": given} for given in batched((text for text in texts if text.strip()), TEXTS_PER_UNIT)]
        elif is_place(argument):
            units += [{"at": argument, **unit} for unit in files.list_units(location(argument))]
        elif argument.lower().endswith(files.SUFFIXES):
            raise ValueError(
                f"{argument}: no such file (a text that ends like a file's name can come as a line of '-')"
            )
        else:
            units.append({"texts": [argument]})
    if not units:
        raise ValueError("nothing to embed: no line came in")
    return units


def is_place(argument: str) -> bool:
    """Whether an argument is a file or a folder, and not a text."""
    if argument.startswith(("s3://", "hf://", "file://")):
        return True
    try:
        return Path(argument).exists()
    except (OSError, ValueError):  # a long text is no path
        return False


def location(argument: str, columns: dict[str, str] | None = None) -> Location:
    return Location(*storage.filesystem(argument), columns or {})


def read_input(unit: dict, columns: dict[str, str]) -> Iterator[Document | Rejected]:
    """The contents of a unit with what the user calls them, unchecked."""
    if "texts" in unit:
        yield from (Document("argument", (Segment(text=text),), text) for text in unit["texts"])
        return
    place = location(unit["at"], columns)
    for item in files.read_unit(place, unit):
        if item.where.startswith(place.path):
            item = replace(item, where=unit["at"] + item.where.removeprefix(place.path))
        yield item


def checked(item: Document | Rejected, bounds: ImageBounds) -> Iterator[Document | Rejected]:
    """The item, or why it cannot be used. A document with text goes on without those of its images that cannot."""
    has_text = isinstance(item, Document) and any(segment.text for segment in item.content)
    return valid_documents([item], bounds, drop_images=has_text)
