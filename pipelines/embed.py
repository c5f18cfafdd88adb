"""Embed your own texts and images with an exported model.

    python pipelines/embed.py --model runs/demo/latest/export/model "a handwritten seven" page.png notes.txt
    python pipelines/embed.py --model DIR --out vectors.parquet *.png
    python pipelines/embed.py --model DIR "the digit seven" *.png --rank

An argument that is a file is read (images by their content, anything else as UTF-8 text); every other argument is a text.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moca_core.data.image_files import ImageBounds
from moca_core.data.validate import problem
from moca_core.types import Content, Segment

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"}


@dataclass(frozen=True)
class Item:
    """What the user named, and what it holds."""

    name: str
    content: Content


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        items = [read_item(argument) for argument in options.items]
        vectors = embed(options.model, items, options.max_tokens)
        if options.out:
            save(options.out, items, vectors)
            print(f"{len(items)} vectors of {vectors.shape[1]} dimensions in {options.out}")
        elif options.rank:
            print_ranking(items, vectors)
        else:
            for item, vector in zip(items, vectors, strict=True):
                print(json.dumps({"item": item.name, "vector": [round(float(x), 6) for x in vector]}))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python pipelines/embed.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("items", nargs="+", metavar="FILE_OR_TEXT")
    parser.add_argument("--model", required=True, help="an exported model: a folder or an s3:// URI")
    output = parser.add_mutually_exclusive_group()
    output.add_argument(
        "--out", help="save to .npy (vectors alone) or .parquet (item and vector) instead of printing JSON lines"
    )
    output.add_argument("--rank", action="store_true", help="rank all other items by their similarity to the first")
    parser.add_argument("--max-tokens", type=int, help="longest input (default: what the model was exported with)")
    return parser.parse_args(arguments)


def read_item(argument: str) -> Item:
    """A file's content, or the argument itself as a text. Raises ValueError for what cannot be embedded."""
    path = Path(argument)
    try:
        is_file = path.is_file()
    except OSError:  # a long text is no path
        is_file = False
    if not is_file:
        if path.suffix.lower() in IMAGE_SUFFIXES:
            raise ValueError(f"{argument}: no such file")
        content: Content = (Segment(text=argument),)
    elif path.suffix.lower() in IMAGE_SUFFIXES:
        content = (Segment(image=path.read_bytes()),)
    else:
        try:
            content = (Segment(text=path.read_text(encoding="utf-8")),)
        except UnicodeDecodeError:
            raise ValueError(
                f"{argument}: neither an image ({', '.join(sorted(IMAGE_SUFFIXES))}) nor UTF-8 text"
            ) from None
    if error := problem(content, ImageBounds()):
        raise ValueError(f"{argument}: {error}")
    return Item(argument, content)


def embed(model: str, items: list[Item], max_tokens: int | None) -> np.ndarray:
    """Unit vectors [items, dimension]. Raises ValueError where `model` is no model folder."""
    from cluster import storage
    from moca_core.embedder import Embedder

    folder = storage.localize(model)
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{model}: no config.json there; --model names the folder that the export step wrote")
    return Embedder(folder, max_tokens=max_tokens).encode([item.content for item in items])


def save(path: str, items: list[Item], vectors: np.ndarray) -> None:
    if path.endswith(".npy"):
        np.save(path, vectors)
    elif path.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"item": [item.name for item in items], "vector": list(vectors)}), path)
    else:
        raise ValueError(f"--out {path}: .npy or .parquet is expected")


def print_ranking(items: list[Item], vectors: np.ndarray) -> None:
    if len(items) < 2:
        raise ValueError("--rank needs a first item and at least one other to compare with it")
    similarity = vectors[1:] @ vectors[0]
    for index in np.argsort(-similarity):
        print(f"{similarity[index]:7.4f}  {items[index + 1].name}")


if __name__ == "__main__":
    sys.exit(main())
