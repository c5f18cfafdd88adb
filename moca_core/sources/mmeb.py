"""MMEB training Parquet: query and positive as text with an image path, negatives as strings that hold a Python list.

Image paths are relative to the file's folder, to the top of the source, or to the folder that `images` names. A task is the folder, the file without its shard number and the modalities of both
sides, so that one file may hold several tasks ("kicad/mmeb_train/text-to-image").
"""

import ast
import re
from collections.abc import Iterator

from moca_core.sources import Location
from moca_core.sources.fields import BadRow, as_text, read_image_file
from moca_core.sources.listing import parquet_units
from moca_core.sources.rows import parquet_rows, read_rows
from moca_core.types import Content, Pair, Rejected, Segment

PLACEHOLDER = "<|image_1|>"  # a literal of this layout, whatever the backbone
COLUMNS = {c: (c,) for c in ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path")}
OPTIONS = {"columns": tuple(COLUMNS), "images": ()}


def list_units(location: Location) -> list[dict]:
    return parquet_units(location)


def read_pairs(location: Location, unit: dict) -> Iterator[Pair | Rejected]:
    path = unit["path"]
    name = task_name(path)

    def pair(row: dict) -> Pair:
        query = content(location, path, row["qry"], row["qry_image_path"])
        positive = content(location, path, row["pos_text"], row["pos_image_path"])
        texts, images = parse_list(row["neg_text"]), parse_list(row["neg_image_path"])
        if len(texts) != len(images):
            raise BadRow(
                "malformed_row", f"{len(texts)} neg_text and {len(images)} neg_image_path; equal numbers are needed"
            )
        sides = zip(texts, images, strict=True)
        negatives = tuple(content(location, path, text, image) for text, image in sides if text or image)
        return Pair(f"{name}/{modality(query)}-to-{modality(positive)}", query, (positive,), negatives)

    return read_rows(parquet_rows(location, unit, COLUMNS), pair)


def task_name(path: str) -> str:
    """Folder and file, shards of one split taken together: ".../MSCOCO/train-00001-of-00004.parquet" is "MSCOCO/train"."""
    folder, file = ("", *path.rsplit("/", 2))[-2:]
    stem = re.sub(r"-\d+-of-\d+$", "", file.removesuffix(".parquet"))
    return f"{folder}/{stem}" if folder else stem


def content(location: Location, path: str, text: str | None, image_path: str | None) -> Content:
    """The image where the placeholder stands (at the front where there is none), and the text around it. Raises BadRow."""
    text, image_path = as_text(text, "text"), as_text(image_path, "image path")
    if not image_path:
        if PLACEHOLDER in text:
            raise BadRow("malformed_row", f"a placeholder and no image path in {text[:60]!r}")
        return (Segment(text=text),)
    before, _, after = text.partition(PLACEHOLDER) if PLACEHOLDER in text else ("", "", text)
    image = Segment(image=read_image_file(location, path, image_path))
    parts = (Segment(text=before), image, Segment(text=after.removeprefix("\n")))
    return tuple(s for s in parts if s.text != "")


def parse_list(value: str | list | None) -> list[str]:
    """A list, or the literal of one, as the public sets store it: read as a literal, never run. Raises BadRow."""
    if not value:
        return []
    try:
        parsed = ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # all that a hostile literal can raise
        parsed = None
    if not isinstance(parsed, list) or not all(item is None or isinstance(item, str) for item in parsed):
        raise BadRow("malformed_row", f"a list of strings was expected, got {str(value)[:60]!r}")
    return ["" if item is None else item for item in parsed]


def modality(side: Content) -> str:
    kinds = {"text" if s.image is None else "image" for s in side}
    # an instruction beside the image does not make it a text
    return "image" if "image" in kinds else "text"
