"""A folder of Markdown or HTML, one document per file, with the images that stand in it.

Images are files beside the page, or inline (data:). Images on the web are not fetched: what their page says in their place stays as
text. An image file that is not there is b"": whether a document may lack one is decided in `data/validate.py`.
"""

import codecs
import re
from collections.abc import Iterator
from urllib.parse import unquote

from moca_core.sources import Location
from moca_core.sources.fields import BadRow, gathered, image_if_there, read_file
from moca_core.sources.html_text import Picture, html_parts
from moca_core.sources.listing import find_files, folder_name, small_file_units
from moca_core.sources.markdown_text import markdown_parts
from moca_core.sources.rows import read_rows
from moca_core.types import Document, Rejected, Segment

OPTIONS = {"images": ()}
HTML = (".html", ".htm", ".xhtml")
MAX_FILE_BYTES = 16 * 2**20
BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
DECLARED = re.compile(rb"<meta[^<>]{0,200}?charset\s{0,9}=\s{0,9}[\"']?\s{0,9}([\w-]{1,40})", re.IGNORECASE)
# As browsers read them; Python's other codecs are no encodings of pages.
CHARSETS = {"iso-8859-1": "windows-1252", "latin1": "windows-1252", "us-ascii": "windows-1252", "gb2312": "gb18030"}
KNOWN_CHARSET = re.compile(
    r"utf-?8|windows-125[0-8]|iso-8859-([1-9]|1[013-6])|gbk|gb18030|big5|shift[-_]jis|euc-(jp|kr)|koi8-[ru]"
)


def list_units(location: Location) -> list[dict]:
    return small_file_units(find_files(location, ".md", ".markdown", *HTML))


def read_unit(location: Location, unit: dict) -> Iterator[Document | Rejected]:
    for path in unit["paths"]:

        def document(row: dict, path: str = path) -> Document:
            is_html = path.lower().endswith(HTML)
            source = _decoded(read_file(location.fs, path, MAX_FILE_BYTES), is_html)
            parts = html_parts(source) if is_html else markdown_parts(source)
            return Document(folder_name(path), gathered(_segments(parts, location, path, "\n\n" if is_html else "")))

        yield from read_rows([(path, {})], document)


def _decoded(data: bytes, is_html: bool) -> str:
    charset = next((name for bom, name in BOMS.items() if data.startswith(bom)), "")
    if not charset and is_html and (declared := DECLARED.search(data[:4096])):
        charset = declared[1].decode().lower()
        charset = CHARSETS.get(charset, charset)
        charset = charset if KNOWN_CHARSET.fullmatch(charset) else ""
    try:
        return data.decode(charset or "utf-8").replace("\r\n", "\n")
    except UnicodeError as error:
        raise BadRow("malformed_text", str(error)) from None


def _segments(parts: list[str | Picture], location: Location, path: str, joint: str) -> Iterator[Segment]:
    """Pictures read; texts that no picture parts any more joined by `joint`."""
    texts: list[str] = []
    for part in parts:
        image = _image(part, location, path) if isinstance(part, Picture) else None
        if image is None:
            texts.append(part.alt if isinstance(part, Picture) else part)
        else:
            yield from _text(texts, joint)
            yield Segment(image=image)
            texts.clear()
    yield from _text(texts, joint)


def _text(texts: list[str], joint: str) -> Iterator[Segment]:
    text = joint.join(filter(None, texts))
    if text.strip():
        yield Segment(text=text)


def _image(picture: Picture, location: Location, path: str) -> bytes | None:
    """None for an image that is somewhere else. Raises BadRow for an inline image that is broken."""
    src = picture.src
    if src[:5].lower() == "data:":
        return image_if_there(src, "image", location, path)
    if not src or re.match(r"[a-zA-Z][\w+.-]*:|//", src):
        return None
    return image_if_there(unquote(re.split("[?#]", src)[0]), "image", location, path)
