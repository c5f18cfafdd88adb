"""MMC4 style JSON lines: `text_list`, sentences, and `image_info`, each image matched to one of them, before which it stands.

An image is inline (`image_base64`) or a file called `image_name`. Most copies lack many of the files: such an image is b"", and
whether a document may lack one is decided in `data/validate.py`.
"""

from collections.abc import Callable, Iterator

from moca_core.sources import Location
from moca_core.sources.fields import BadRow, as_list, as_text, from_base64, gathered, image_if_there
from moca_core.sources.listing import folder_name, line_units
from moca_core.sources.rows import json_rows, read_rows
from moca_core.types import Content, Document, Rejected, Segment

OPTIONS = {"images": ()}


def list_units(location: Location) -> list[dict]:
    return line_units(location, ".jsonl")


def read_unit(location: Location, unit: dict) -> Iterator[Document | Rejected]:
    path = unit["path"]

    def document(row: dict) -> Document:
        return Document(
            folder_name(path), interleave(row, lambda name: image_if_there(name, "image_name", location, path))
        )

    return read_rows(json_rows(location, unit), document)


def interleave(row: dict, image_file: Callable[[str], bytes]) -> Content:
    """The sentences of a row, and before each the images that are matched with it. Raises BadRow."""
    texts = [as_text(text, "text_list") for text in as_list(row.get("text_list"), "text_list")]
    before: dict[int, list[dict]] = {}
    for info in as_list(row.get("image_info"), "image_info"):
        if not isinstance(info, dict):
            raise BadRow("malformed_row", f"image_info: an object was expected, got {type(info).__name__}")
        place = info.get("matched_text_index")
        if type(place) is not int or not 0 <= place < len(texts):
            raise BadRow("malformed_row", f"matched_text_index is {place!r} beside {len(texts)} texts")
        before.setdefault(place, []).append(info)
    return gathered(_segments(texts, before, image_file))


def _segments(texts: list[str], before: dict[int, list[dict]], image_file: Callable[[str], bytes]) -> Iterator[Segment]:
    places = sorted(before.keys() | {0})
    for place, next_place in zip(places, [*places[1:], len(texts)], strict=True):
        yield from (Segment(image=_image(info, image_file)) for info in before.get(place, []))
        yield Segment(text=" ".join(filter(None, texts[place:next_place])))


def _image(info: dict, image_file: Callable[[str], bytes]) -> bytes:
    inline = as_text(info.get("image_base64"), "image_base64")
    if inline:
        return from_base64(inline, "image_base64")
    name = as_text(info.get("image_name"), "image_name")
    return image_file(name) if name else b""
