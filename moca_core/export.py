"""Export: one folder that transformers.AutoModel and sentence_transformers.SentenceTransformer load as the trained encoder.

The layout is what readers of these versions really need: weights under the names of `ForConditionalGeneration`, `is_causal` at
the top level and in the text config, mean pooling and normalising as sentence-transformers modules, and a chat template
that renders exactly what training rendered.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer

from moca_core.attention import attention_of, set_attention
from moca_core.backbone import load_backbone, save_backbone
from moca_core.spec import MASK_TOKEN, BackboneSpec

# Texts as they are, images between the vision tokens, in the place of IMAGE: data/render.py in Jinja.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}IMAGE"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


def export_model(
    model_folder: str,
    out: str,
    spec: BackboneSpec,
    *,
    max_tokens: int,
    dtype: torch.dtype,
    matryoshka_dims: Sequence[int] = (),
) -> None:
    """Writes the finished folder, with the attention of the trained one. `max_tokens` is the longest sequence of its readers,
    `matryoshka_dims` are the shorter vectors that it was trained to give too: serving engines offer those."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    model = load_backbone(model_folder, dtype)
    set_attention(model, attention_of(model))  # said at both levels, also where the trained folder says nothing
    weights = model.state_dict()
    weights.pop("lm_head.weight", None)  # an embedding model needs no language head
    if matryoshka_dims:
        model.config.matryoshka_dimensions = sorted(matryoshka_dims)
    save_backbone(model, out, weights)
    _write_processor(model_folder, folder, spec, max_tokens)
    _write_sentence_transformers(folder, spec, max_tokens)


def _write_processor(model_folder: str, folder: Path, spec: BackboneSpec, max_tokens: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    if MASK_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [MASK_TOKEN]}, replace_extra_special_tokens=False)
    assert tokenizer.convert_tokens_to_ids(MASK_TOKEN) == spec.mask_token_id
    start, image, end = tokenizer.convert_ids_to_tokens(
        [spec.vision_start_token_id, spec.image_token_id, spec.vision_end_token_id]
    )
    tokenizer.model_max_length = max_tokens
    tokenizer.padding_side = "right"
    tokenizer.chat_template = CHAT_TEMPLATE.replace("IMAGE", start + image + end)
    tokenizer.save_pretrained(folder)
    _add_image_token(folder / "tokenizer_config.json", image)
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        # Image and text alone: the processor of Qwen2.5-VL itself also wants a video processor, and with it torchvision.
        "processor_class": "PaddleOCRVLProcessor",
        "size": {"shortest_edge": spec.min_image_px, "longest_edge": spec.max_image_px},
        "patch_size": spec.patch_size_px,
        "temporal_patch_size": spec.temporal_patch_size,
        "merge_size": spec.merge_size,
        "image_mean": spec.image_mean,
        "image_std": spec.image_std,
    }
    _write_json(folder / "preprocessor_config.json", processor)
    _write_json(folder / "processor_config.json", {"processor_class": processor["processor_class"]})


def _add_image_token(path: Path, image_token: str) -> None:
    """Names the placeholder that the processor repeats for every image token."""
    config = json.loads(path.read_text())
    config["model_specific_special_tokens"] = {"image_token": image_token}
    config["processor_class"] = "PaddleOCRVLProcessor"
    _write_json(path, config)


def _write_sentence_transformers(folder: Path, spec: BackboneSpec, max_tokens: int) -> None:
    modules = [
        ("", "sentence_transformers.base.modules.transformer.Transformer"),
        ("1_Pooling", "sentence_transformers.sentence_transformer.modules.pooling.Pooling"),
        ("2_Normalize", "sentence_transformers.sentence_transformer.modules.normalize.Normalize"),
    ]
    entries = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(modules)]
    _write_json(folder / "modules.json", entries)
    _write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "prompts": {},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )
    forward = {"method": "forward", "method_output_name": "last_hidden_state"}
    modalities = {"text": forward, "image": forward, "message": {**forward, "format": "structured"}}
    transformer = {"transformer_task": "feature-extraction", "modality_config": modalities}
    transformer |= {"module_output_name": "token_embeddings", "unpad_inputs": False}
    _write_json(folder / "sentence_bert_config.json", transformer)
    for path, _ in modules[1:]:
        (folder / path).mkdir(exist_ok=True)
    _write_json(
        folder / "1_Pooling" / "config.json",
        {"embedding_dimension": spec.text_hidden, "pooling_mode": "mean", "include_prompt": True},
    )
    _write_json(folder / "2_Normalize" / "config.json", {})


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
