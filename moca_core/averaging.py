"""The mean of the weights of several models, read and written block by block: no model is ever in memory.

Several snapshots of one training: model soups (arXiv 2203.05482). A trained model and the one it started from: WiSE-FT (arXiv 2109.01903).
"""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

BLOCK_ELEMENTS = 2**24  # 128 MB of float64
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file: where its bytes begin, and what they are."""

    path: Path
    first_byte: int
    dtype: str
    shape: tuple[int, ...]


def average_models(folders: Sequence[str], shares: Sequence[float], out: str) -> None:
    """Writes the folder `out`: every weight is the sum of `shares[i]` times that of `folders[i]`, all else is as in `folders[0]`.

    That is its config, with the attention it declares, its processor, its files and their layout, and its precision, in which the
    others need not be: sums are float64, so the mean of equal models is that model to the bit. Raises ValueError for shares that
    are negative or do not add up to 1, and for models that differ in the names or shapes of their weights.
    """
    if len(shares) != len(folders) or min(shares) < 0 or not math.isclose(sum(shares), 1):
        raise ValueError(
            f"shares={list(shares)} of {len(folders)} models must be one each, not negative, and add up to 1"
        )
    models = [stored_tensors(folder) for folder in folders]
    for folder, model in zip(folders[1:], models[1:], strict=True):
        require_same(folders[0], models[0], folder, model)
    files = weight_files(folders[0])
    shutil.copytree(
        folders[0], out, ignore=lambda _, names: {file.name for file in files} & set(names), dirs_exist_ok=True
    )
    for file in files:
        inside = [name for name, tensor in models[0].items() if tensor.path == file]
        with (Path(out) / file.name).open("wb") as target:
            target.write(read_header(file))
            for name in sorted(inside, key=lambda name: models[0][name].first_byte):
                assert target.tell() == models[0][name].first_byte, f"{file}: {name} does not follow the one before it"
                write_mean(target, [model[name] for model in models], shares)


def write_mean(target: BinaryIO, tensors: list[Stored], shares: Sequence[float]) -> None:
    """Appends the mean of one weight over all models, in the precision of the first."""
    elements = math.prod(tensors[0].shape)
    for first in range(0, elements, BLOCK_ELEMENTS):
        count = min(BLOCK_ELEMENTS, elements - first)
        mean = shares[0] * read_block(tensors[0], first, count)
        for tensor, share in zip(tensors[1:], shares[1:], strict=True):
            mean.add_(read_block(tensor, first, count), alpha=share)
        target.write(mean.to(DTYPES[tensors[0].dtype]).view(torch.uint8).numpy())


def read_block(tensor: Stored, first: int, count: int) -> torch.Tensor:
    """Elements of a tensor as it lies, flat: [count] float64."""
    dtype = DTYPES[tensor.dtype]
    with tensor.path.open("rb") as file:
        file.seek(tensor.first_byte + first * dtype.itemsize)
        block = bytearray(count * dtype.itemsize)
        read = file.readinto(block)
    assert read == len(block), f"{tensor.path} ends within a weight"
    return torch.frombuffer(block, dtype=dtype).double()


def require_same(first_folder: str, first: dict[str, Stored], folder: str, other: dict[str, Stored]) -> None:
    """ValueError naming weights that only one of two models has, or that have another shape in it."""
    if first.keys() != other.keys():
        raise ValueError(
            f"{first_folder} and {folder} cannot be averaged: only the first has {sorted(first.keys() - other.keys())[:5]}, "
            f"only the second {sorted(other.keys() - first.keys())[:5]}"
        )
    for name, tensor in first.items():
        if other[name].shape != tensor.shape:
            raise ValueError(
                f"{name} is {list(tensor.shape)} in {first_folder} and {list(other[name].shape)} in {folder}: "
                "only models of one shape can be averaged"
            )


def stored_tensors(folder: str) -> dict[str, Stored]:
    """{name: weight} of a model folder. ValueError for a weight that is no floating point number."""
    tensors = {}
    for path in weight_files(folder):
        header = read_header(path)
        for name, entry in json.loads(header[8:]).items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{path}: {name} is {entry['dtype']}; a mean needs one of {', '.join(DTYPES)}")
            first_byte = len(header) + entry["data_offsets"][0]
            tensors[name] = Stored(path, first_byte, entry["dtype"], tuple(entry["shape"]))
    return tensors


def weight_files(folder: str) -> list[Path]:
    """The safetensors files that hold the model of a Hugging Face folder. ValueError if it has none."""
    root = Path(folder)
    if (root / INDEX).exists():
        return [root / name for name in sorted(set(json.loads((root / INDEX).read_text())["weight_map"].values()))]
    if not (root / "model.safetensors").exists():
        raise ValueError(f"{folder} holds neither model.safetensors nor {INDEX}")
    return [root / "model.safetensors"]


def read_header(path: Path) -> bytes:
    """All that stands before the tensors in a safetensors file: eight bytes of length, then JSON."""
    with path.open("rb") as file:
        length = file.read(8)
        return length + file.read(int.from_bytes(length, "little"))
