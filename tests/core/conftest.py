"""One tiny model for all tests of the core: real Hugging Face folders, weights large enough that a leak shows."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import BOUNDS, WORDS

from moca_core.bootstrap import TinyConfig, create
from moca_core.data.render import Renderer, load_tokenizer
from moca_core.folder import PROCESSOR_FILES, copy_processor
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


def enliven(folder):
    """Weights of one known scale: large enough that a broken mask shows, small enough for float32 to agree."""
    path = Path(folder) / "model.safetensors"
    weights = {k: w * (0.1 / w.std()) if w.dim() > 1 else w for k, w in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny Qwen2.5-VL, causal, as bootstrap writes it."""
    path = str(tmp_path_factory.mktemp("qwen2_5_vl"))
    create(path, [" ".join(WORDS)] * 20, SIZES, seed=1)
    enliven(path)
    return path


@pytest.fixture(scope="session")
def qwen2_folder(folder, tmp_path_factory):
    """A tiny Qwen2-VL with the same tokenizer and image processor."""
    from transformers import Qwen2_5_VLConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration

    path = str(tmp_path_factory.mktemp("qwen2_vl"))
    given = Qwen2_5_VLConfig.from_pretrained(folder).to_dict()
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "tie_word_embeddings")
    text = {k: v for k, v in given["text_config"].items() if k not in ("model_type", "layer_types")}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, **{n: given[n] for n in names})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        Qwen2VLForConditionalGeneration(config).save_pretrained(path)
    copy_processor(folder, path)
    enliven(path)
    return path


@pytest.fixture(scope="session", params=["qwen2_5_vl", "qwen2_vl"])
def any_folder(request, folder, qwen2_folder):
    return {"qwen2_5_vl": folder, "qwen2_vl": qwen2_folder}[request.param]


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
