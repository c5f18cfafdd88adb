"""BackboneSpec: everything the data side must know of a vision-language model, read once from its folder."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MASK_TOKEN = "<|mask|>"
MAX_ASPECT_RATIO = 200  # of an image; above it the backbone's own resizing refuses


@dataclass(frozen=True)
class BackboneSpec:
    """Token ids, image geometry and sizes of a Qwen2-VL / Qwen2.5-VL checkpoint.

    One image token stands for `merge_size`² patches of `patch_size_px`² pixels. `special_token_ids` are never masked.
    """

    image_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    mask_token_id: int
    special_token_ids: tuple[int, ...]
    vocab_size: int
    patch_size_px: int
    merge_size: int
    temporal_patch_size: int
    channels: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    min_image_px: int
    max_image_px: int
    text_hidden: int
    text_layers: int
    text_params_per_layer: int
    vision_hidden: int
    vision_layers: int
    vision_params_per_layer: int
    merger_params: int

    @property
    def factor_px(self) -> int:
        """Side of the square that one image token covers, in pixels."""
        return self.patch_size_px * self.merge_size

    @property
    def group_size(self) -> int:
        """Patches behind one image token."""
        return self.merge_size**2

    @property
    def patch_values(self) -> int:
        """Values of one patch of a still image (without the temporal copy)."""
        return self.channels * self.patch_size_px**2

    @property
    def max_image_tokens(self) -> int:
        """The most tokens that an image can have. Long thin ones pass `max_image_px`, as no side shrinks below one token, and so do
        small ones that grow to a `min_image_px` close to it."""
        most, least = self.max_image_px / self.factor_px**2, self.min_image_px / self.factor_px**2
        thin, grown = math.sqrt(MAX_ASPECT_RATIO * most), max(math.sqrt(MAX_ASPECT_RATIO * least), 2 * math.ceil(least))
        return max(int(most), int(thin), math.ceil(grown))

    def image_tokens(self, grid_thw: tuple[int, int, int]) -> int:
        time, height, width = grid_thw
        return time * height * width // self.group_size

    def flops(self, segment_lengths: list[int], image_patches: list[int]) -> float:
        """Forward and backward FLOPs of packed segments and images: 6 per weight and token, attention within segments.

        Vision attention is counted over whole images; windowed layers do less.
        """
        tokens, patches = sum(segment_lengths), sum(image_patches)
        linear = 6.0 * (
            tokens * self.text_layers * self.text_params_per_layer
            + patches * self.vision_layers * self.vision_params_per_layer
            + patches // self.group_size * self.merger_params
        )
        attention = 12.0 * (
            self.text_layers * self.text_hidden * sum(n * n for n in segment_lengths)
            + self.vision_layers * self.vision_hidden * sum(n * n for n in image_patches)
        )
        return linear + attention

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BackboneSpec":
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


SUPPORTED = ("qwen2_vl", "qwen2_5_vl")


def read_spec(folder: str, *, min_image_px: int | None = None, max_image_px: int | None = None) -> BackboneSpec:
    """Reads the spec of the checkpoint in `folder`; image bounds may be narrowed below the processor's own.

    Raises ValueError for model types other than Qwen2-VL and Qwen2.5-VL, and where no row of the embedding is free for the mask token.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in SUPPORTED:
        raise ValueError(
            f"{folder}: model_type {config.model_type!r} is not supported; use one of {', '.join(SUPPORTED)}"
        )
    text, vision = config.get_text_config(), config.vision_config
    tokens, first_free = _read_tokenizer(folder)
    mask_token_id = _mask_token_id(folder, tokens, first_free, text.vocab_size)
    processor = _image_processor(folder)
    size = processor.get("size") or {}
    own_min = processor.get("min_pixels") or size.get("shortest_edge")
    own_max = processor.get("max_pixels") or size.get("longest_edge")
    head_dim = text.hidden_size // text.num_attention_heads
    vision_hidden = vision.hidden_size if config.model_type == "qwen2_5_vl" else vision.embed_dim
    if config.model_type == "qwen2_5_vl":
        vision_mlp = 3 * vision_hidden * vision.intermediate_size
    else:
        vision_mlp = 2 * vision_hidden * int(vision_hidden * vision.mlp_ratio)
    merged = vision_hidden * vision.spatial_merge_size**2
    return BackboneSpec(
        image_token_id=config.image_token_id,
        vision_start_token_id=config.vision_start_token_id,
        vision_end_token_id=config.vision_end_token_id,
        mask_token_id=mask_token_id,
        special_token_ids=tuple(sorted({*tokens.values(), mask_token_id})),
        vocab_size=text.vocab_size,
        patch_size_px=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
        channels=vision.in_channels,
        image_mean=tuple(processor["image_mean"]),
        image_std=tuple(processor["image_std"]),
        min_image_px=min_image_px or own_min,
        max_image_px=max_image_px or own_max,
        text_hidden=text.hidden_size,
        text_layers=text.num_hidden_layers,
        text_params_per_layer=text.hidden_size
        * (2 * text.hidden_size + 2 * text.num_key_value_heads * head_dim + 3 * text.intermediate_size),
        vision_hidden=vision_hidden,
        vision_layers=vision.depth,
        vision_params_per_layer=4 * vision_hidden**2 + vision_mlp,
        merger_params=merged * merged + merged * text.hidden_size,
    )


def _read_tokenizer(folder: str) -> tuple[dict[str, int], int]:
    """The added tokens by name, and how many rows of the embedding the tokenizer can reach."""
    tokenizer = json.loads((Path(folder) / "tokenizer.json").read_text())
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    return added, max([*tokenizer["model"]["vocab"].values(), *added.values()]) + 1


def _mask_token_id(folder: str, added: dict[str, int], first_free: int, vocab_size: int) -> int:
    """The id of the mask token: its own where the tokenizer has one, else the first row of the embedding that no token uses."""
    if MASK_TOKEN in added:
        return added[MASK_TOKEN]
    if first_free >= vocab_size:
        raise ValueError(f"{folder}: the embedding has {vocab_size} rows and none is free for {MASK_TOKEN}")
    return first_free


def _image_processor(folder: str) -> dict[str, Any]:
    """The image settings, from preprocessor_config.json or the newer processor_config.json."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = Path(folder) / name
        if path.exists():
            values = json.loads(path.read_text())
            values = values.get("image_processor", values)
            if "image_mean" in values:
                return values
    raise ValueError(f"{folder}: no preprocessor_config.json with image_mean, image_std and the bounds in pixels")


def with_image_bounds(folder: str, min_image_px: int, max_image_px: int) -> bytes:
    """The folder's image settings as preprocessor_config.json, with these bounds: what reads the folder later resizes alike."""
    settings = {k: v for k, v in _image_processor(folder).items() if k not in ("min_pixels", "max_pixels")}
    settings["size"] = {"shortest_edge": min_image_px, "longest_edge": max_image_px}
    return json.dumps(settings, indent=2).encode()
