"""What vLLM itself reads from an exported folder, beside what was trained.

    pip install vllm                # in an environment of its own; no GPU is needed for this
    PYTHONPATH=. python benchmarks/vllm_reading.py --model runs/demo/latest/export/model

vLLM's configuration of the model (attention, pooling, normalising, batching), its names of the weights, and its processor: the tokens and
pixels that it makes of texts and images, put through the model in plain transformers, give the vectors of this project's encoder.
Exits with 1 where anything differs. vLLM's own kernels are not run.
"""

import argparse
import io
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoTokenizer

from moca_core.embedder import Embedder
from moca_core.readers import as_message
from moca_core.spec import BackboneSpec
from moca_core.types import Content, Segment

LEAST_COSINE = 0.999  # vLLM's processor resizes with torchvision, this project with Pillow


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="an exported folder")
    folder = parser.parse_args().model
    from vllm.engine.arg_utils import EngineArgs

    embedder = Embedder(folder, device="cpu")
    arguments = {"runner": "pooling", "convert": "embed", "max_model_len": embedder.renderer.max_tokens}
    config = EngineArgs(model=folder, **arguments).create_model_config()
    found = read_settings(config) | {"weights that it has no place for": unplaced(config, folder)}
    right = expected_settings(embedder) | {"weights that it has no place for": []}
    agree = True
    for name, value in found.items():
        same = value == right[name]
        agree &= same
        print(f"{'ok  ' if same else 'FAIL'}  {name}: {value}" + ("" if same else f", trained: {right[name]}"))
    for name, cosine in compare_inputs(config, folder, embedder).items():
        agree &= cosine >= LEAST_COSINE
        print(f"{'ok  ' if cosine >= LEAST_COSINE else 'FAIL'}  inputs as vLLM makes them, {name}: cosine {cosine:.6f}")
    return 0 if agree else 1


def read_settings(config) -> dict[str, object]:
    return {
        "architecture": config.architecture,
        "attention": config.attn_type,
        "pooling": config.pooler_config.seq_pooling_type,
        "normalised": config.pooler_config.use_activation,
        "prefixes cached": config.is_prefix_caching_supported,
        "inputs computed in chunks": config.is_chunked_prefill_supported,
        "dimensions": config.hf_text_config.hidden_size,
        "shorter vectors": config.matryoshka_dimensions or [],
    }


def expected_settings(embedder: Embedder) -> dict[str, object]:
    declared = embedder.encoder.backbone.config
    return {
        "architecture": declared.architectures[0],
        "attention": "encoder_only" if embedder.attention == "bidirectional" else "decoder",
        "pooling": "MEAN",
        "normalised": True,
        "prefixes cached": False,
        "inputs computed in chunks": False,
        "dimensions": embedder.dimension,
        "shorter vectors": getattr(declared, "matryoshka_dimensions", None) or [],
    }


def unplaced(config, folder: str) -> list[str]:
    """Names that vLLM's mapping does not bring below one of its two towers."""
    from vllm.model_executor.models import ModelRegistry

    model, _ = ModelRegistry.resolve_model_cls(config.architectures, config)
    names = []
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names += file.keys()
    assert names, f"{folder}: no safetensors"
    mapped = model.hf_to_vllm_mapper.apply_list(names)
    return [name for name in mapped if not name.startswith(("language_model.model.", "visual."))]


@torch.inference_mode()
def compare_inputs(config, folder: str, embedder: Embedder) -> dict[str, float]:
    """The cosine between this project's vector and that of what vLLM's processor makes of the same content, by content."""
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.processing.context import TimingContext
    from vllm.multimodal.processing.inputs import ProcessorInputs

    processor = MULTIMODAL_REGISTRY.create_processor(config)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    image_token = AutoConfig.from_pretrained(folder).image_token_id
    cosines = {}
    for name, content in contents().items():
        message = as_message(content)
        prompt = tokenizer.encode(tokenizer.apply_chat_template(message, tokenize=False), add_special_tokens=False)
        images = [part["image"] for part in message[0]["content"] if part["type"] == "image"]
        inputs: dict[str, torch.Tensor] = {}
        ids = prompt
        if images:
            items = processor.info.parse_mm_data({"image": images})
            made = processor.apply(ProcessorInputs(prompt, items), TimingContext(enabled=False))
            ids = made["prompt_token_ids"]
            fields = made["mm_kwargs"]["image"]
            pixels = torch.cat([field["pixel_values"].data for field in fields])
            inputs["pixel_values"] = normalised(pixels, embedder.spec) if pixels.dtype == torch.uint8 else pixels
            inputs["image_grid_thw"] = torch.stack([field["image_grid_thw"].data for field in fields])
        tokens = torch.tensor([ids])
        inputs |= {"input_ids": tokens, "mm_token_type_ids": (tokens == image_token).int()}
        mean = model(**inputs).last_hidden_state[0].mean(0).numpy()
        cosines[name] = float(mean @ embedder.encode([content])[0] / np.linalg.norm(mean))
    return cosines


def normalised(pixels: torch.Tensor, spec: BackboneSpec) -> torch.Tensor:
    """uint8 patches [P, channels * rest] as vLLM normalises them later, on its device."""
    mean, std = torch.tensor(spec.image_mean)[:, None], torch.tensor(spec.image_std)[:, None]
    return ((pixels.view(len(pixels), len(mean), -1) / 255 - mean) / std).flatten(1)


def contents() -> dict[str, Content]:
    """A text, an image, both, and several images between texts. The images are smooth, as photographs are."""
    first, second = (Segment(image=gradient(width, height)) for width, height in ((200, 120), (90, 160)))
    text = Segment(text="a board with two connectors")
    return {
        "text": (text,),
        "image": (first,),
        "image and text": (first, text),
        "text and images": (text, first, Segment(text="and another"), second),
    }


def gradient(width: int, height: int) -> bytes:
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    pixels = np.stack([x, y, 0.5 + 0.5 * np.sin(9 * x * y)], axis=-1) * 255
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main())
