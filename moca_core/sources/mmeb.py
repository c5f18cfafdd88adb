"""MMEB training Parquet, which the pairs of MoCa and the synthetic ones of mmE5 follow: sides as a text with an image path.

Negatives are texts, lists of texts or strings that hold a Python list. Image paths are relative to the file's folder, to the
top of the source, or to the folder that `images` names. A task is the folder, the file without its shard number and the
modalities of both sides, so that one file may hold several tasks ("kicad/mmeb_train/text-to-image").
"""

import ast
import re
from collections.abc import Iterator

from moca_core.sources import Location
from moca_core.sources.fields import BadRow, as_text, read_image_file
from moca_core.sources.listing import parquet_units
from moca_core.sources.pairing import modality, pair_of, task_name
from moca_core.sources.rows import parquet_rows, read_rows
from moca_core.types import Content, Pair, Rejected, Segment

PLACEHOLDER = "<|image_1|>"  # a literal of this layout, whatever the backbone
NEGATIVES = ("neg_text", "neg_image_path")
MAX_LITERAL_CHARS = 2**20  # parsing takes a hundred times that and more
ITEM = r"(?:None|[uU]?(?:'(?:[^'\\]++|\\.)*+'|\"(?:[^\"\\]++|\\.)*+\"))"
# A comma between every two: Python would make one text of neighbours without, as str() writes a NumPy array.
LIST = re.compile(rf"\s*+\[\s*+(?:{ITEM}\s*+(?:,\s*+{ITEM}\s*+)*+(?:,\s*+)?+)?+\]\s*+", re.DOTALL)
COLUMNS = {c: (c,) for c in ("qry", "qry_image_path", "pos_text", "pos_image_path", *NEGATIVES)}
OPTIONS = {"columns": tuple(COLUMNS), "images": ()}
list_units = parquet_units


def read_pairs(location: Location, unit: dict) -> Iterator[Pair | Rejected]:
    path = unit["path"]
    name = task_name(path)

    def pair(row: dict) -> Pair:
        query = content(location, path, row["qry"], row["qry_image_path"])
        positive = content(location, path, row["pos_text"], row["pos_image_path"])
        listed = parallel(row["neg_text"], row["neg_image_path"], NEGATIVES)
        negatives = (content(location, path, text, image) for text, image in listed)
        return pair_of(f"{name}/{modality(query)}-to-{modality(positive)}", query, [positive], negatives)

    return read_rows(parquet_rows(location, unit, COLUMNS, NEGATIVES), pair)


def content(location: Location, path: str, text: str | None, image_path: str | None) -> Content:
    """The image where the placeholder stands (at the front where there is none), and the text around it. Raises BadRow."""
    text, image_path = as_text(text, "text"), as_text(image_path, "image path")
    marks = text.count(PLACEHOLDER)
    if marks > (1 if image_path else 0):
        raise BadRow("malformed_row", f"{marks} placeholders and image path {image_path!r} for {text[:60]!r}")
    if not image_path:
        return (Segment(text=text),)
    before, _, after = text.partition(PLACEHOLDER) if marks else ("", "", text)
    image = Segment(image=read_image_file(location, path, image_path))
    parts = (Segment(text=before), image, Segment(text=after.removeprefix("\n")))
    return tuple(s for s in parts if s.text != "")


def parallel(texts: str | list | None, images: str | list | None, roles: tuple[str, str]) -> list[tuple[str, str]]:
    """(text, image path) of every entry of two lists; a column without entries is one of empty ones. Raises BadRow."""
    some_texts, some_images = parse_list(texts), parse_list(images)
    some_texts = some_texts or [""] * len(some_images)
    some_images = some_images or [""] * len(some_texts)
    if len(some_texts) != len(some_images):
        numbers = f"{len(some_texts)} {roles[0]} and {len(some_images)} {roles[1]}"
        raise BadRow("malformed_row", f"{numbers}; equal numbers are needed")
    return list(zip(some_texts, some_images, strict=True))


def parse_list(value: str | list | None) -> list[str]:
    """A list, the literal of one (read as a literal, never run) or a single text, as the public sets have them. Raises BadRow."""
    if not value:
        return []
    parsed = value
    if isinstance(value, str):
        if not value.lstrip().startswith("["):
            return [value]
        try:
            known = len(value) <= MAX_LITERAL_CHARS and LIST.fullmatch(value)
            parsed = ast.literal_eval(value.strip()) if known else None
        except (ValueError, SyntaxError, MemoryError):  # all that is left to raise for a hostile literal
            parsed = None
    if not isinstance(parsed, list) or not all(item is None or isinstance(item, str) for item in parsed):
        raise BadRow("malformed_row", f"a list of strings was expected, got {str(value)[:60]!r}")
    return ["" if item is None else item for item in parsed]
