"""Any folder, for those who bring no layout: every file is read as what its name says it is, one document each.

Images, Markdown and HTML with their images, texts; a PDF is the picture of every page, as retrieval of pages is measured everywhere;
a table is a document for every row.
"""

from collections.abc import Iterator
from dataclasses import replace

from moca_core.sources import Location, contents, markup, pdf, plain_text
from moca_core.sources.fields import MAX_IMAGE_BYTES, read_file
from moca_core.sources.listing import (
    byte_range_units,
    find_files,
    folder_name,
    row_group_units,
    small_file_units,
)
from moca_core.sources.pairing import LINE_FILES, is_parquet
from moca_core.sources.rows import read_rows
from moca_core.types import Document, Rejected, Segment

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm")
MARKUP = (".md", ".markdown", *markup.HTML)
TEXTS = (".txt",)
PDFS = (".pdf",)
TABLES = (".parquet", *LINE_FILES)
SUFFIXES = IMAGES + MARKUP + TEXTS + PDFS + TABLES
OPTIONS = contents.OPTIONS


def list_units(location: Location, suffixes: tuple[str, ...] = SUFFIXES) -> list[dict]:
    """A single file that is none of these is read as a text."""
    files = find_files(location, *suffixes)
    tables = [file for file in files if is_a(file[0], TABLES)]
    pdfs = [file for file in files if is_a(file[0], PDFS)]
    rest = [file for file in files if not is_a(file[0], TABLES + PDFS)]
    parquet = [path for path, _ in tables if is_parquet(path)]
    lines = [file for file in tables if not is_parquet(file[0])]
    whole = small_file_units(rest) + [{"path": path} for path, _ in pdfs]
    return whole + row_group_units(location.fs, parquet) + byte_range_units(lines)


def read_unit(location: Location, unit: dict) -> Iterator[Document | Rejected]:
    if "paths" in unit:
        return (item for path in unit["paths"] for item in _read_file(location, path))
    if is_a(unit["path"], PDFS):
        return (_picture(page) for page in pdf.read_pages(location, unit))
    return contents.read_unit(location, unit)


def _picture(page: Document | Rejected) -> Document | Rejected:
    return page if isinstance(page, Rejected) else replace(page, content=page.content[:1])


def is_a(path: str, suffixes: tuple[str, ...]) -> bool:
    return path.lower().endswith(suffixes)


def _read_file(location: Location, path: str) -> Iterator[Document | Rejected]:
    if is_a(path, IMAGES):
        return read_rows([(path, {})], lambda row: _image(location, path))
    if is_a(path, MARKUP):
        return markup.read_unit(location, {"paths": [path]})
    texts = plain_text.read_unit(location, {"paths": [path]})
    return texts if is_a(path, TEXTS) else map(_unknown, texts)


def _unknown(item: Document | Rejected) -> Document | Rejected:
    """What a file is that its name says nothing about."""
    if isinstance(item, Document) or item.reason != "malformed_text":
        return item
    return replace(
        item, detail=f"neither an image, document or table by its name ({', '.join(SUFFIXES)}) nor UTF-8 text"
    )


def _image(location: Location, path: str) -> Document:
    return Document(folder_name(path), (Segment(image=read_file(location.fs, path, MAX_IMAGE_BYTES)),))
