"""Files of a folder as what can be found in them: pages of PDFs, images, passages of Markdown, HTML and texts."""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from cluster import storage
from moca_core.data.image_files import ImageBounds, decode
from moca_core.data.passages import passages
from moca_core.data.render import Renderer
from moca_core.data.validate import valid_documents
from moca_core.sources import Location, files, pdf
from moca_core.sources.listing import find_files
from moca_core.types import Content, Document, Rejected

SUFFIXES = files.IMAGES + files.MARKUP + files.TEXTS + files.PDFS
SNIPPET_CHARS = 400
PICTURE_SIDE_PX = 560
JPEG_QUALITY = 82


@dataclass(frozen=True)
class File:
    """A file below the folder, and `key`, which stands for all that was read for it: equal keys, equal entries."""

    path: str
    key: str


@dataclass(frozen=True)
class Entry:
    """What one vector stands for: page or passage `number` (from 1) of the file with this key."""

    key: str
    number: int
    kind: str  # "page", "image" or "text"
    snippet: str
    picture: bytes | None  # small, for the eye
    content: Content

    def row(self) -> dict:
        """What is kept of it."""
        kept = {name: value for name, value in vars(self).items() if name != "content"}
        return kept | {"has_picture": self.picture is not None}


def list_documents(folder: str) -> Iterator[File | Rejected]:
    """The files below a folder in name order. A Markdown or HTML file is another one when an image in it is."""
    place = Location(*storage.filesystem(folder))
    for path, _ in find_files(place, *SUFFIXES):
        name = str(Path(path).relative_to(place.path))
        if files.is_a(path, files.MARKUP):
            item = next(iter(files.read_unit(place, {"paths": [path]})))
            yield replace(item, where=name) if isinstance(item, Rejected) else File(name, item.doc_id)
        else:
            with open(path, "rb") as file:
                yield File(name, hashlib.file_digest(file, "sha256").hexdigest()[:32])


def read_entries(folder: str, file: File, renderer: Renderer, bounds: ImageBounds) -> Iterator[Entry | Rejected]:
    """The entries of a file. `where` of what cannot be used is the place in the file, whatever it is called."""
    place = Location(*storage.filesystem(folder))
    path = str(Path(place.path) / file.path)
    number = 0
    for item in _read(place, path, bounds):
        if isinstance(item, Rejected):
            yield replace(item, where=item.where.removeprefix(path).lstrip())
        elif files.is_a(path, files.PDFS):
            number = int(item.where.rpartition(" ")[2])
            yield entry(file.key, number, "page", item.content[:1], "".join(s.text or "" for s in item.content))
        elif files.is_a(path, files.IMAGES):
            yield entry(file.key, 1, "image", item.content, "")
        else:
            for passage in passages(item.content, renderer):
                number += 1
                yield entry(file.key, number, "text", passage, "\n\n".join(s.text for s in passage if s.text))


def _read(place: Location, path: str, bounds: ImageBounds) -> Iterator[Document | Rejected]:
    if files.is_a(path, files.PDFS):
        return valid_documents(pdf.read_pages(place, {"path": path}), bounds)
    mixed = files.is_a(path, files.MARKUP)
    return valid_documents(files.read_unit(place, {"paths": [path]}), bounds, drop_images=mixed)


def entry(key: str, number: int, kind: str, content: Content, text: str) -> Entry:
    image = next((segment.image for segment in content if segment.image is not None), None)
    snippet = " ".join(text[: 4 * SNIPPET_CHARS].split())
    snippet = snippet if len(snippet) <= SNIPPET_CHARS else snippet[:SNIPPET_CHARS].rsplit(" ", 1)[0] + " …"
    return Entry(key, number, kind, snippet, None if image is None else small_picture(image), content)


def small_picture(data: bytes) -> bytes:
    """PNG or JPEG, whichever is smaller."""
    image = decode(data, ImageBounds())
    image.thumbnail((PICTURE_SIDE_PX, PICTURE_SIDE_PX), Image.Resampling.LANCZOS)
    png, jpeg = io.BytesIO(), io.BytesIO()
    image.save(png, "PNG")
    image.save(jpeg, "JPEG", quality=JPEG_QUALITY)
    return min(png.getvalue(), jpeg.getvalue(), key=len)
