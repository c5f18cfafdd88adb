"""A tiny vision-language model of any family from nothing: byte BPE tokenizer, image processor and weights, in Hugging Face format."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers.trainers import BpeTrainer
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, Qwen2Tokenizer

from moca_core.family import family_of
from moca_core.spec import MASK_TOKEN

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    MASK_TOKEN,
)

# the pixel statistics of CLIP, which every Qwen-VL checkpoint uses
IMAGE_MEAN = [0.48145466, 0.4578275, 0.40821073]
IMAGE_STD = [0.26862954, 0.26130258, 0.27577711]


@dataclass(frozen=True)
class TinyConfig:
    """Family and sizes of the tiny model. Head dimensions are hidden size over heads: at least 16 and a multiple of 8 (mRoPE splits
    them). In qwen2_vl `vision_intermediate` is a multiple of `vision_hidden`."""

    family: str = "qwen2_5_vl"
    vocab_size: int = 4096
    text_hidden: int = 128
    text_layers: int = 4
    text_heads: int = 4
    text_kv_heads: int = 2
    text_intermediate: int = 384
    vision_hidden: int = 96
    vision_layers: int = 4
    vision_heads: int = 3
    vision_intermediate: int = 256
    min_image_px: int = 56 * 56
    max_image_px: int = 280 * 280

    def __post_init__(self) -> None:
        family = family_of(self.family)
        if self.min_image_px > self.max_image_px:
            raise ValueError(f"min_image_px={self.min_image_px} is above max_image_px={self.max_image_px}: set both")
        for tower, hidden, heads in (
            ("text", self.text_hidden, self.text_heads),
            ("vision", self.vision_hidden, self.vision_heads),
        ):
            if hidden % heads or (hidden // heads) % 8 or hidden // heads < 16:
                raise ValueError(
                    f"{tower}_hidden={hidden} over {tower}_heads={heads} must be a multiple of 8 and at least 16 a head"
                )
        family.tiny_vision(self)  # sizes that the family cannot have are refused here, and not when the model is made


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer with Qwen2's splitting rules, trained on `texts`."""
    untrained = Qwen2Tokenizer(vocab={}, merges=[])
    trained = untrained.backend_tokenizer
    size = vocab_size - len(SPECIAL_TOKENS)
    from tokenizers.pre_tokenizers import ByteLevel

    trainer = BpeTrainer(vocab_size=size, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    trained.train_from_iterator(texts, trainer)
    model = json.loads(trained.to_str())["model"]
    vocab = {token: i for token, i in model["vocab"].items() if token not in SPECIAL_TOKENS}
    vocab = {token: i for i, token in enumerate(sorted(vocab, key=vocab.get))}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[tuple(merge) for merge in model["merges"]])
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS[1:])})
    return tokenizer


def model_config(tokenizer: Qwen2Tokenizer, sizes: TinyConfig) -> PreTrainedConfig:
    token = tokenizer.convert_tokens_to_ids
    head_dim = sizes.text_hidden // sizes.text_heads
    time = head_dim // 8
    space = (head_dim // 2 - time) // 2
    return AutoConfig.for_model(
        sizes.family,
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": sizes.text_hidden,
            "intermediate_size": sizes.text_intermediate,
            "num_hidden_layers": sizes.text_layers,
            "num_attention_heads": sizes.text_heads,
            "num_key_value_heads": sizes.text_kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": 32768,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [head_dim // 2 - 2 * space, space, space],
            },
            "bos_token_id": None,
            "eos_token_id": token("<|endoftext|>"),
            "pad_token_id": token("<|endoftext|>"),
            "tie_word_embeddings": True,
            "initializer_range": sizes.text_hidden
            ** -0.5,  # 0.02 suits a hidden size of 2500; a narrow model starves on it
        },
        vision_config=family_of(sizes.family).tiny_vision(sizes) | {"initializer_range": sizes.vision_hidden**-0.5},
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def create(folder: str, texts: Iterable[str], sizes: TinyConfig, *, seed: int) -> None:
    """Writes tokenizer, image processor, config and freshly initialised weights to `folder`."""
    config = describe(folder, texts, sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(folder)


def describe(folder: str, texts: Iterable[str], sizes: TinyConfig) -> PreTrainedConfig:
    """Writes all but the weights, which is what a spec is read from, and returns the config."""
    tokenizer = train_tokenizer(texts, sizes.vocab_size)
    tokenizer.save_pretrained(folder)
    config = model_config(tokenizer, sizes)
    config.save_pretrained(folder)
    vision = config.vision_config
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": sizes.min_image_px, "longest_edge": sizes.max_image_px},
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "image_mean": IMAGE_MEAN,
        "image_std": IMAGE_STD,
    }
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))
    return config
