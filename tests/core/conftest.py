"""A tiny model of every family for all tests of the core."""

import shutil

import pytest
import torch

from moca_core.data.render import Renderer, load_tokenizer
from moca_core.folder import PROCESSOR_FILES
from moca_core.spec import read_spec
from tests.tiny import FAMILIES, tiny_model

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A tiny model of every family, causal, as bootstrap writes it."""
    paths = {family: str(tmp_path_factory.mktemp(family)) for family in FAMILIES}
    for family, path in paths.items():
        tiny_model(path, family)
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
    return copied(folder, tmp_path)


@pytest.fixture
def any_folder_copy(any_folder, tmp_path):
    return copied(any_folder, tmp_path)


def copied(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    assert any((tmp_path / "model" / name).exists() for name in PROCESSOR_FILES)
    return tmp_path / "model"
