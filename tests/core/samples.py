"""Made-up contents, and what plain transformers makes of them: the definition that the packed code is held against."""

import io
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from transformers import AutoModel, Qwen2VLImageProcessorPil

from moca_core.data.masking import packed_stream
from moca_core.data.rows import packed_row, sequence_row
from moca_core.types import Segment

BOUNDS = (56 * 56, 196 * 196)  # pixels of an image: 4 to 49 tokens, so that the larger ones have several windows

PROSE = (
    "a board is a sheet of copper with holes in it and every hole joins two layers of the same net so that current "
    "flows from the regulator to the load without heating the trace more than the rules of the design allow . "
    "the editor draws zones around pads and fills them when the check has passed ; a schematic names parts and wires"
)
WORDS = PROSE.split()


def words(count, seed=0):
    return " ".join(np.random.default_rng(seed).choice(WORDS, count))


def picture(width, height, seed=0, mode="RGB"):
    """Random blocks of colour: no two patches alike, and resizing changes them smoothly."""
    if mode in "P1":
        return picture(width, height, seed).quantize(32) if mode == "P" else picture(width, height, seed).convert("1")
    bands = len(Image.new(mode, (1, 1)).getbands())
    noise = np.random.default_rng(seed).integers(0, 256, (7, 9, bands), dtype=np.uint8).squeeze()
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR)


@lru_cache(maxsize=256)
def png(width, height, seed=0, mode="RGB"):
    buffer = io.BytesIO()
    picture(width, height, seed, mode).save(buffer, "PNG")
    return buffer.getvalue()


def text(value):
    return Segment(text=value)


def image(width, height, seed=0, mode="RGB"):
    return Segment(image=png(width, height, seed, mode))


# text alone, image alone, mixed, images of several sizes, an image first and last
CONTENTS = (
    (text(words(30, 1)),),
    (image(196, 196, 1),),
    (text(words(5, 2)), image(84, 112, 2), text(words(9, 3))),
    (image(60, 250, 3), text(words(3, 4)), image(196, 150, 4), image(56, 56, 5), text(words(12, 5)), image(90, 90, 6)),
    (text(words(1, 6)),),
)


def row_of(contents, renderer):
    """These contents as one packed row, in this order."""
    sequences = [sequence_row(f"piece-{i}", renderer.first(c)) for i, c in enumerate(contents)]
    return packed_row(sequences, renderer.spec)


def stream_of(contents, renderer):
    return packed_stream(row_of(contents, renderer), renderer.spec)


def plain_inputs(rendered, folder, spec):
    """Keyword arguments of a transformers forward over one sequence."""
    ids = torch.tensor([rendered.input_ids])
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == spec.image_token_id).int()}
    if rendered.images:
        processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        images = [Image.open(io.BytesIO(i)).convert("RGB") for i in rendered.images]
        inputs |= processor(images=images, return_tensors="pt")
    return inputs


def plain_model(folder, causal, implementation="sdpa"):
    """transformers' own model with the one switch that makes it bidirectional, unpacked."""
    model = AutoModel.from_pretrained(folder, attn_implementation=implementation).eval()
    model.config.text_config.is_causal = causal
    return model


def parts(values, lengths):
    return torch.split(values, list(lengths))
