"""Fields of a row, read with suspicion: the right type or a BadRow."""

import posixpath
from typing import Any

import pyarrow.fs as pafs

from moca_core.sources import Location


class BadRow(ValueError):
    """A row that cannot be used; `reason` is the snake_case word it is counted under."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason

    def __reduce__(self):  # exceptions cross process borders
        return BadRow, (self.reason, str(self))


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
    """Encoded bytes of an image: given as bytes, as a struct of bytes and path (Hugging Face's image feature), or as a path.

    b"" for an image that is None or empty: whether a document may lack one is decided in `data/validate.py`.
    Raises BadRow for other types, and for a path under which there is no file.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if value is None or isinstance(value, bytes):
        return value or b""
    if not isinstance(value, str):
        raise BadRow("malformed_row", f"{role}: an image was expected, got {type(value).__name__}")
    return read_image_file(location, file, value) if value else b""


def read_image_file(location: Location, file: str, name: str) -> bytes:
    """Bytes of the image that a row of `file` names: below `location.images`, else beside the file, else at the top of the source.

    Raises BadRow where there is none, also for a name that points out of those folders.
    """
    relative = posixpath.normpath(name)
    if relative.startswith(("/", "..")):
        raise BadRow("image_missing", f"{name} lies outside of the source")
    for folder in [location.images] if location.images else [posixpath.dirname(file), location.path]:
        path = posixpath.join(folder, relative)
        try:
            with location.fs.open_input_file(path) as source:
                return source.read()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            if location.fs.get_file_info(path).type != pafs.FileType.Directory:
                raise
    raise BadRow("image_missing", f"no file {name}")
