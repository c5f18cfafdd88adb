"""BackboneSpec: everything the data side must know of a vision-language model, read once from its folder."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moca_core.family import family_of
from moca_core.flops import Grid, language_flops, vision_flops

MASK_TOKEN = "<|mask|>"
MAX_ASPECT_RATIO = 200  # of an image; above it the backbone's own resizing refuses


@dataclass(frozen=True)
class BackboneSpec:
    """Token ids, image geometry and sizes of a checkpoint of one of the families.

    One image token stands for `merge_size`² patches of `patch_size_px`² pixels. `special_token_ids` are never masked. Params are
    weights of matrices, without biases and norms. `text_width` and `text_kv_width` are heads times head dimension of queries and
    of keys. Of the vision layers, `vision_full_layers` see the whole image, the others windows of `vision_window_px`² pixels.
    `vision_position_side` is the side of the square of learned patch positions, 0 where there are none.
    """

    model_type: str
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
    text_width: int
    text_kv_width: int
    text_intermediate: int
    vision_hidden: int
    vision_layers: int
    vision_params_per_layer: int
    merger_params: int
    vision_full_layers: int
    vision_window_px: int
    vision_position_side: int

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

    @property
    def text_params_per_layer(self) -> int:
        return self.text_hidden * (2 * self.text_width + 2 * self.text_kv_width + 3 * self.text_intermediate)

    @property
    def patch_params(self) -> int:
        """Weights of the patch embedding."""
        return self.vision_hidden * self.patch_values * self.temporal_patch_size

    def flops(self, segment_lengths: list[int], grids: list[Grid]) -> float:
        """Forward and backward FLOPs of both towers over packed segments with these images."""
        return language_flops(self, segment_lengths).trained() + vision_flops(self, grids).trained()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BackboneSpec":
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def read_spec(folder: str, *, min_image_px: int | None = None, max_image_px: int | None = None) -> BackboneSpec:
    """Reads the spec of the checkpoint in `folder`; image bounds may be narrowed below the processor's own.

    Raises ValueError for a model type of no known family, where no row of the embedding is free for the mask token, and for bounds that
    no image can keep.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    try:
        family = family_of(config.model_type)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    text, vision = config.get_text_config(), config.vision_config
    tokens, first_free = _read_tokenizer(folder)
    mask_token_id = _mask_token_id(folder, tokens, first_free, text.vocab_size)
    processor = _image_processor(folder)
    factor_px = vision.patch_size * vision.spatial_merge_size
    least, most = _image_bounds(folder, processor, factor_px, min_image_px, max_image_px)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return BackboneSpec(
        model_type=config.model_type,
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
        min_image_px=least,
        max_image_px=most,
        text_hidden=text.hidden_size,
        text_layers=text.num_hidden_layers,
        text_width=text.num_attention_heads * head_dim,
        text_kv_width=text.num_key_value_heads * head_dim,
        text_intermediate=text.intermediate_size,
        **family.vision_sizes(vision),
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


def _image_bounds(
    folder: str, processor: dict[str, Any], factor_px: int, least: int | None, most: int | None
) -> tuple[int, int]:
    """The fewest and the most pixels of an image: those given, else the processor's own."""
    size = processor.get("size") or {}
    least = (processor.get("min_pixels") or size.get("shortest_edge")) if least is None else least
    most = (processor.get("max_pixels") or size.get("longest_edge")) if most is None else most
    if least is None or most is None or not factor_px**2 <= least <= most:
        raise ValueError(
            f"{folder}: images from min_image_px={least} to max_image_px={most}: the least must be {factor_px**2} (one image token) "
            "or more and not above the most; set both, for one that is not set is the checkpoint's own"
        )
    return least, most


def with_image_bounds(folder: str, min_image_px: int, max_image_px: int) -> bytes:
    """The folder's image settings as preprocessor_config.json, with these bounds: what reads the folder later resizes alike."""
    settings = {k: v for k, v in _image_processor(folder).items() if k not in ("min_pixels", "max_pixels")}
    settings["size"] = {"shortest_edge": min_image_px, "longest_edge": max_image_px}
    return json.dumps(settings, indent=2).encode()
