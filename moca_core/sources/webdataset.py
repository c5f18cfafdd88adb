"""WebDataset tars: files whose names are the same up to the first dot are one sample. Also .tar.gz and .tar.zst; never extracted.

An image (or several) with a caption in .txt or .json; a .json with `texts` and `images`, lists of one length, the images naming files
of the sample or frames of its .tiff (MINT-1T's PDFs); or a .json with MMC4's fields. `columns` may name the caption: a field of the
.json, or the extension of a file; a sample with neither is a bad row. Names without an extension belong to no sample.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from moca_core.sources import Location
from moca_core.sources.fields import BadRow, as_text, gathered, image_if_there
from moca_core.sources.listing import file_units, folder_name
from moca_core.sources.mmc4 import interleave
from moca_core.sources.rows import broken_data, read_rows, unpacked
from moca_core.sources.tar_stream import Member, members
from moca_core.sources.tiff import frames
from moca_core.types import Content, Document, Rejected, Segment

OPTIONS = {"columns": ("text",), "images": ()}
CAPTIONS = ("caption", "text", "txt", "vlm_caption", "description", "alt_text")
IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "ppm")
NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)  # what is before the first dot, and after
MAX_SAMPLE_BYTES = 256 * 2**20
MAX_SAMPLE_FILES = 10_000


@dataclass
class Sample:
    """The files of one key by their extension, as far as they are read; `problem` says why not all are."""

    key: str
    files: dict[str, bytes] = field(default_factory=dict)
    size: int = 0
    problem: BadRow | None = None

    def add(self, extension: str, member: Member) -> None:
        if extension in self.files:
            self.problem = BadRow("malformed_row", f"two files {member.name[:200]}")
        elif member.data is None:
            self.problem = BadRow("file_too_large" if "bytes" in member.unread else "not_a_file", member.unread)
        elif self.size + len(member.data) > MAX_SAMPLE_BYTES or len(self.files) == MAX_SAMPLE_FILES:
            self.problem = BadRow("file_too_large", f"more than {MAX_SAMPLE_BYTES} bytes or {MAX_SAMPLE_FILES} files")
        else:
            self.files[extension] = member.data
            self.size += len(member.data)


def list_units(location: Location) -> list[dict]:
    return file_units(location, ".tar", ".tar.gz", ".tgz", ".tar.zst")


def read_unit(location: Location, unit: dict) -> Iterator[Document | Rejected]:
    path = unit["path"]

    def document(row: dict) -> Document:
        return Document(folder_name(path), _content(row["files"], location, path))

    return read_rows(_rows(location, path), document)


def _rows(location: Location, path: str) -> Iterator[tuple[str, dict | BadRow]]:
    where = f"{path} from its start"
    try:
        with location.fs.open_input_file(path) as raw, broken_data():
            for sample in _samples(members(unpacked(raw, path), MAX_SAMPLE_BYTES)):
                yield f"{path} member {sample.key}", sample.problem or {"files": sample.files}
                where = f"{path} after member {sample.key}"
    except BadRow as error:
        yield where, error


def _samples(files: Iterator[Member]) -> Iterator[Sample]:
    """Neighbouring files of one key. Of a broken archive the last sample may not be whole. Raises BadRow in its place."""
    sample: Sample | None = None
    for member in files:
        if not (name := NAME.fullmatch(member.name)):
            continue
        if sample is None or sample.key != name[1]:
            if sample:
                yield sample
            sample = Sample(name[1])
        sample.add(name[2].lower(), member)
    if sample:
        yield sample


def _content(files: dict[str, bytes], location: Location, path: str) -> Content:
    fields = next((_fields(data) for name, data in files.items() if _last(name) == "json"), {})
    images = {name: data for name, data in files.items() if _last(name) in IMAGES}
    if isinstance(fields.get("texts"), list) and isinstance(fields.get("images"), list):
        return _interleaved(fields["texts"], fields["images"], images)
    if "text_list" in fields:
        return interleave(
            fields, lambda name: _named(name, images) or image_if_there(name, "image_name", location, path)
        )
    caption = _caption(files, fields, location.columns.get("text"))
    return (*(Segment(image=data) for data in images.values()), *([Segment(text=caption)] if caption else []))


def _interleaved(texts: list, names: list, images: dict[str, bytes]) -> Content:
    if len(texts) != len(names) or any((t is None) == (n is None) for t, n in zip(texts, names, strict=True)):
        detail = f"{len(texts)} texts and {len(names)} images; each position needs exactly one of the two"
        raise BadRow("texts_images_mismatch", detail)
    wanted = {as_text(name, "images"): b"" for name in names if name is not None}
    found = {name: _named(name, images) for name in wanted}
    tiffs = [data for name, data in images.items() if _last(name) in ("tif", "tiff")]
    if wanted and not any(found.values()) and len(tiffs) == 1:
        found = dict(zip(wanted, frames(tiffs[0], len(wanted)), strict=True))
    return gathered(
        Segment(text=as_text(text, "texts")) if name is None else Segment(image=found[name])
        for text, name in zip(texts, names, strict=True)
    )


def _named(name: str, images: dict[str, bytes]) -> bytes:
    """The image of a sample by the end of its file's name, with or without what kind it is; b"" where there is none."""
    last = name.rpartition("/")[2].lower()
    for known, data in images.items():
        if last in (known, known.rpartition(".")[0]) or last.endswith(f".{known}"):
            return data
    return b""


def _caption(files: dict[str, bytes], fields: dict, given: str | None) -> str:
    """The first caption that is not empty: a field of the .json, else a file. Raises BadRow for a given name that is neither."""
    if given and given not in fields and given not in files:
        known = ", ".join([*fields, *files])[:200]
        raise BadRow(
            "malformed_row", f"no {given} for 'text', neither a field of the .json nor a file; there are {known}"
        )
    names = (given,) if given else CAPTIONS
    for name in names:
        if text := as_text(fields.get(name), name):
            return text
    name = next((name for name in names if name in files), None)
    return _decoded(files[name], name) if name else ""


def _fields(data: bytes) -> dict:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadRow("malformed_json", str(error)) from None
    if not isinstance(fields, dict):
        raise BadRow("malformed_json", f"an object was expected, got {type(fields).__name__}")
    return fields


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRow("malformed_text", f"{name}: {error}") from None


def _last(extension: str) -> str:
    return extension.rpartition(".")[2]
