"""A tiny model of every family: real Hugging Face folders, with weights large enough that a leak shows."""

from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file, save_file

from moca_core.bootstrap import TinyConfig, create
from tests.core.samples import BOUNDS, WORDS

FAMILIES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl")

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
    min_image_px=BOUNDS[0],
    max_image_px=BOUNDS[1],
)


def tiny_model(folder, family):
    """Written to `folder`: causal, as bootstrap writes it."""
    sizes = replace(SIZES, family=family, vision_intermediate=32 if family == "qwen2_vl" else 48)
    create(folder, [" ".join(WORDS)] * 20, sizes, seed=1 + FAMILIES.index(family))
    enliven(folder)


def enliven(folder):
    """Weights of one known scale: large enough that a broken mask shows, small enough for float32 to agree."""
    path = Path(folder) / "model.safetensors"
    weights = {k: w * (0.1 / w.std()) if w.dim() > 1 else w for k, w in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
