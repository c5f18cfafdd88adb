"""Fields of a row, read with suspicion: the right type or a BadRow."""

import base64
import errno
import posixpath
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

import pyarrow.fs as pafs

from moca_core.sources import Location
from moca_core.types import Content, Segment

MAX_CONTENT_BYTES = 512 * 2**20
MAX_IMAGE_BYTES = 256 * 2**20  # far above what a recipe allows: only so that a mistaken file is never read whole


class BadRow(ValueError):
    """A row that cannot be used; `reason` is the snake_case word it is counted under."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason

    def __reduce__(self):  # exceptions cross process borders
        return BadRow, (self.reason, str(self))


def gathered(segments: Iterable[Segment]) -> Content:
    """The segments but for empty texts. Raises BadRow as soon as they are too many bytes: a short row may name a large file often."""
    held: list[Segment] = []
    held_bytes = 0
    for segment in segments:
        held_bytes += len(segment.image or segment.text or b"")
        if held_bytes > MAX_CONTENT_BYTES:
            raise BadRow("document_too_large", f"more than {MAX_CONTENT_BYTES} bytes in one document")
        if segment.text != "":
            held.append(segment)
    return tuple(held)


def as_text(value: Any, role: str) -> str:
    """A text; "" for None. Raises BadRow for anything else, and for text that has no UTF-8 (half of a surrogate pair)."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow("malformed_row", f"{role}: text was expected, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow("malformed_text", f"{role}: {error}") from None
    return value


def as_list(value: Any, role: str) -> list:
    """A list; [] for None. Raises BadRow for anything else."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadRow("malformed_row", f"{role}: a list was expected, got {type(value).__name__}")
    return value


def as_image(value: Any, role: str, location: Location, file: str) -> bytes:
    """Encoded bytes of an image: given as bytes, as a struct of bytes and path (Hugging Face's image feature), as a path or data: URI.

    b"" for an image that is None or empty: whether a document may lack one is decided in `data/validate.py`.
    Raises BadRow for other types, for a path under which there is no file (`image_if_there` does not), and for a broken data: URI.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if value is None or isinstance(value, bytes):
        return value or b""
    if not isinstance(value, str):
        raise BadRow("malformed_row", f"{role}: an image was expected, got {type(value).__name__}")
    if value[:5].lower() == "data:":
        head, _, data = as_text(value, role).partition(",")
        return from_base64(unquote(data), role) if head.lower().endswith(";base64") else unquote_to_bytes(data)
    return read_image_file(location, file, value) if value else b""


def from_base64(encoded: str, role: str) -> bytes:
    """What is encoded, in one line or several. Raises BadRow for what is no base64."""
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)
    except ValueError as error:
        raise BadRow("malformed_row", f"{role}: no base64: {error}") from None


def image_if_there(value: Any, role: str, location: Location, file: str) -> bytes:
    """As `as_image`, but b"" where there is no such file: for documents, most copies of which lack some images."""
    try:
        return as_image(value, role, location, file)
    except BadRow as error:
        if error.reason != "image_missing":
            raise
        return b""


def read_image_file(location: Location, file: str, name: str) -> bytes:
    """Bytes of the image that a row of `file` names: below `location.images`, else beside the file, else at the top of the source.

    Raises BadRow where there is none, also for a name that points out of those folders or cannot be one.
    """
    relative = posixpath.normpath(as_text(name, "image path"))
    if relative.startswith(("/", "..")) or "\0" in relative:
        raise BadRow("image_missing", f"{name[:200]!r} lies outside of the source")
    for folder in [location.images] if location.images else [posixpath.dirname(file), location.path]:
        path = posixpath.join(folder, relative)
        try:
            return read_file(location.fs, path, MAX_IMAGE_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                break
            if location.fs.get_file_info(path).type != pafs.FileType.Directory:
                raise
    raise BadRow("image_missing", f"no file {name[:200]}")


def read_file(fs: pafs.FileSystem, path: str, max_bytes: int) -> bytes:
    """The content of a file. Raises BadRow for more than `max_bytes`, of which no more are read."""
    with fs.open_input_file(path) as source:
        data = source.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise BadRow("file_too_large", f"{path} has more than {max_bytes} bytes")
    return data
