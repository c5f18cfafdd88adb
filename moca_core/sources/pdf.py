"""A folder of PDFs: for every page its picture and then the text of its text layer, PAGES_PER_DOCUMENT pages to a document.

PDFium, the renderer of Chrome, reads them. It is not thread-safe: one process reads one file at a time. Memory is flat over the
pages of a file: each is closed before the next one is opened.
"""

import io
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from moca_core.sources import Location
from moca_core.sources.fields import BadRow, read_file
from moca_core.sources.listing import file_units, folder_name
from moca_core.sources.rows import read_rows
from moca_core.types import Document, Rejected, Segment

if TYPE_CHECKING:
    from pypdfium2 import PdfDocument

OPTIONS: dict[str, tuple[str, ...]] = {}
PAGES_PER_DOCUMENT = 8
MAX_PAGES = 10_000
MAX_FILE_BYTES = 256 * 2**20
MAX_TEXT_CHARS = 200_000  # of a page
POINTS_PER_INCH = 72
DOTS_PER_INCH = 150
MAX_SIDE_PX = 2048
JPEG_QUALITY = 90


def list_units(location: Location) -> list[dict]:
    return file_units(location, ".pdf")


def read_unit(location: Location, unit: dict) -> Iterator[Document | Rejected]:
    return _read(location, unit["path"], PAGES_PER_DOCUMENT)


def read_pages(location: Location, unit: dict) -> Iterator[Document | Rejected]:
    """A document for every page: its picture, and its text if it has one."""
    return _read(location, unit["path"], 1)


def _read(location: Location, path: str, pages_per_document: int) -> Iterator[Document | Rejected]:
    def document(row: dict) -> Document:
        content = [segment for number in row["pages"] for segment in _page(row["pdf"], number)]
        return Document(folder_name(path), tuple(content))

    return read_rows(_runs(location, path, pages_per_document), document)


def _runs(location: Location, path: str, pages_per_run: int) -> Iterator[tuple[str, dict | BadRow]]:
    """Runs of neighbouring pages of a file that can be opened."""
    from pypdfium2 import PdfDocument, PdfiumError
    from pypdfium2.raw import FPDF_ERR_PASSWORD

    try:
        pdf = PdfDocument(read_file(location.fs, path, MAX_FILE_BYTES))
    except BadRow as error:
        yield path, error
        return
    except PdfiumError as error:
        encrypted = error.err_code == FPDF_ERR_PASSWORD
        yield path, BadRow("pdf_encrypted" if encrypted else "pdf_unreadable", str(error))
        return
    try:
        if not 0 < len(pdf) <= MAX_PAGES:
            yield path, BadRow("pdf_unreadable", f"{len(pdf)} pages; 1 to {MAX_PAGES} are read")
            return
        for first in range(0, len(pdf), pages_per_run):
            pages = range(first, min(first + pages_per_run, len(pdf)))
            named = f"page {first + 1}" if pages_per_run == 1 else f"pages {first + 1} to {pages[-1] + 1}"
            yield f"{path} {named}", {"pdf": pdf, "pages": pages}
    finally:
        pdf.close()


def _page(pdf: "PdfDocument", number: int) -> Iterator[Segment]:
    """The picture of a page, and its text if it has one. Raises BadRow."""
    from pypdfium2 import PdfiumError

    try:
        page = pdf[number]
    except PdfiumError as error:
        raise BadRow("pdf_unreadable", f"page {number + 1}: {error}") from None
    try:
        width, height = page.get_size()
        if not (0 < width < math.inf and 0 < height < math.inf):
            raise BadRow("pdf_unreadable", f"page {number + 1} is {width} by {height} points")
        scale = min(DOTS_PER_INCH / POINTS_PER_INCH, MAX_SIDE_PX / max(width, height))
        bitmap = page.render(scale=scale * (1 - 1e-9))  # it rounds up, also 1650.0000000001
        try:
            yield Segment(image=_encoded(bitmap.to_pil().convert("RGB")))
        finally:
            bitmap.close()
        textpage = page.get_textpage()
        try:
            text = textpage.get_text_range(count=min(textpage.count_chars(), MAX_TEXT_CHARS))
        finally:
            textpage.close()
        # PDFium marks a word cut at the end of a line with a character that is none
        if text := text.replace("\r\n", "\n").replace("\ufffe", "").strip():
            yield Segment(text=text)
    except PdfiumError as error:
        raise BadRow("pdf_unreadable", f"page {number + 1}: {error}") from None
    finally:
        page.close()


def _encoded(image) -> bytes:
    """PNG or JPEG, whichever is smaller: text and drawings make small PNGs, scans do not."""
    png, jpeg = io.BytesIO(), io.BytesIO()
    image.save(png, "PNG")
    image.save(jpeg, "JPEG", quality=JPEG_QUALITY)
    return min(png.getvalue(), jpeg.getvalue(), key=len)
