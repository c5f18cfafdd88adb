"""One tiny model for all tests of the core: real Hugging Face folders, weights large enough that a leak shows."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import BOUNDS, WORDS

from moca_core.bootstrap import TinyConfig, create
from moca_core.data.render import Renderer, load_tokenizer
from moca_core.folder import PROCESSOR_FILES
from moca_core.spec import read_spec

torch.set_num_threads(1)

SIZES = TinyConfig(
    vocab_size=400,
    text_hidden=32,
    text_layers=3,
    text_heads=2,
    text_kv_heads=1,
    text_intermediate=48,
    vision_hidden=32,
    vision_layers=2,
    vision_heads=2,
    vision_intermediate=48,
    min_image_px=BOUNDS[0],
    max_image_px=BOUNDS[1],
)


FAMILIES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl")


def enliven(folder):
    """Weights of one known scale: large enough that a broken mask shows, small enough for float32 to agree."""
    path = Path(folder) / "model.safetensors"
    weights = {k: w * (0.1 / w.std()) if w.dim() > 1 else w for k, w in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A tiny model of every family, causal, as bootstrap writes it."""
    paths = {family: str(tmp_path_factory.mktemp(family)) for family in FAMILIES}
    for number, (family, path) in enumerate(paths.items(), 1):
        create(path, [" ".join(WORDS)] * 20, replace(SIZES, family=family), seed=number)
        enliven(path)
    return paths


@pytest.fixture(scope="session")
def folder(folders):
    return folders["qwen2_5_vl"]


@pytest.fixture(scope="session")
def qwen2_folder(folders):
    return folders["qwen2_vl"]


@pytest.fixture(scope="session", params=FAMILIES)
def any_folder(request, folders):
    return folders[request.param]


@pytest.fixture(scope="session")
def spec(folder):
    return read_spec(folder)


@pytest.fixture(scope="session")
def tokenizer(folder):
    return load_tokenizer(f"{folder}/tokenizer.json")


@pytest.fixture(scope="session")
def renderer(tokenizer, spec):
    return Renderer(tokenizer, spec, 256)


@pytest.fixture
def folder_copy(folder, tmp_path):
    """A copy of the model folder that a test may spoil."""
    shutil.copytree(folder, tmp_path / "model")
    assert any((tmp_path / "model" / name).exists() for name in PROCESSOR_FILES)
    return tmp_path / "model"
