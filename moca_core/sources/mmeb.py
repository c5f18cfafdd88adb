"""MMEB training Parquet: query and positive as text with an image path, negatives as strings that hold a Python list.

Image paths are relative to the file's folder. A task is the folder, the file without its shard number and the modalities of both
sides, so that one file may hold several tasks ("kicad/mmeb_train/text-to-image").
"""

import ast
import re
from collections.abc import Iterator

import pyarrow.fs as pafs

from moca_core.sources.listing import find_files, parquet_rows, read_beside
from moca_core.types import Content, Pair, Rejected, Segment

PLACEHOLDER = "<|image_1|>"  # a literal of this layout, whatever the backbone
COLUMNS = ["qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path"]


def list_units(fs: pafs.FileSystem, path: str) -> list[dict]:
    return find_files(fs, path, ".parquet")


def read_pairs(fs: pafs.FileSystem, unit: dict) -> Iterator[Pair | Rejected]:
    path = unit["path"]
    name = task_name(path)
    for number, row in enumerate(parquet_rows(fs, path, COLUMNS)):
        try:
            query = content(fs, path, row["qry"], row["qry_image_path"])
            positive = content(fs, path, row["pos_text"], row["pos_image_path"])
            sides = zip(parse_list(row["neg_text"]), parse_list(row["neg_image_path"]), strict=True)
            negatives = tuple(content(fs, path, text, image) for text, image in sides if text or image)
        except FileNotFoundError as error:
            yield Rejected("image_missing", str(error), f"{path} row {number}")
        except ValueError as error:
            yield Rejected("malformed_row", str(error), f"{path} row {number}")
        else:
            yield Pair(f"{name}/{modality(query)}-to-{modality(positive)}", query, (positive,), negatives)


def task_name(path: str) -> str:
    """Folder and file, shards of one split taken together: ".../MSCOCO/train-00001-of-00004.parquet" is "MSCOCO/train"."""
    folder, file = ("", *path.rsplit("/", 2))[-2:]
    stem = re.sub(r"-\d+-of-\d+$", "", file.removesuffix(".parquet"))
    return f"{folder}/{stem}" if folder else stem


def content(fs: pafs.FileSystem, path: str, text: str | None, image_path: str | None) -> Content:
    """The image where the placeholder stands (at the front where there is none), and the text around it."""
    text = text or ""
    if not image_path:
        if PLACEHOLDER in text:
            raise ValueError(f"a placeholder and no image path in {text[:60]!r}")
        return (Segment(text=text),)
    before, _, after = text.partition(PLACEHOLDER) if PLACEHOLDER in text else ("", "", text)
    image = Segment(image=read_beside(fs, path, image_path))
    parts = (Segment(text=before), image, Segment(text=after.removeprefix("\n")))
    return tuple(s for s in parts if s.text != "")


def parse_list(value: str | list | None) -> list[str]:
    """A list, or the literal of one, as the public sets store it: read as a literal, never run. Raises ValueError."""
    if not value:
        return []
    try:
        parsed = ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # all that a hostile literal can raise
        parsed = None
    if not isinstance(parsed, list) or not all(item is None or isinstance(item, str) for item in parsed):
        raise ValueError(f"a list of strings was expected, got {value[:60]!r}")
    return ["" if item is None else item for item in parsed]


def modality(side: Content) -> str:
    kinds = {"text" if s.image is None else "image" for s in side}
    # an instruction beside the image does not make it a text
    return "image" if "image" in kinds else "text"
