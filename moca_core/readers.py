"""How other libraries turn contents into vectors with an exported folder: what the users of the folder will get."""

import io
from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np
import torch
from PIL import Image, ImageOps

from moca_core.data.image_files import is_deep
from moca_core.types import Content, Segment

BATCH = 8
MTEB_COLUMNS = (("text",), ("image",), ("image", "text"))

Reader = Callable[[str, Sequence[Content]], np.ndarray]
"""(folder, contents) to vectors [contents, D], float32, of length 1 up to the rounding of the reader."""


def with_transformers(folder: str, contents: Sequence[Content]) -> np.ndarray:
    """AutoModel and AutoProcessor, as the model card says: chat template, padded batches, the mean over all tokens."""
    from transformers import AutoModel, AutoProcessor

    processor, model = AutoProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    vectors = []
    for start in range(0, len(contents), BATCH):
        messages = [as_message(content) for content in contents[start : start + BATCH]]
        prompts = [processor.apply_chat_template(message, tokenize=False) for message in messages]
        images = [part["image"] for message in messages for part in message[0]["content"] if part["type"] == "image"]
        inputs = processor(text=prompts, images=images or None, padding=True, return_tensors="pt")
        with torch.inference_mode():
            states = model(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"][..., None]
        vectors.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(vectors).numpy()


def with_sentence_transformers(folder: str, contents: Sequence[Content]) -> np.ndarray:
    """`SentenceTransformer.encode` of messages."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device="cpu")
    return model.encode([as_message(content) for content in contents], batch_size=BATCH, show_progress_bar=False)


def with_mteb(folder: str, contents: Sequence[Content]) -> np.ndarray:
    """mteb's own wrapper of sentence-transformers, fed with rows as its tasks are. Contents must be such as `fits_mteb` says."""
    import mteb
    from datasets import Dataset
    from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
    from sentence_transformers import SentenceTransformer
    from torch.utils.data import DataLoader

    model = SentenceTransformerEncoderWrapper(SentenceTransformer(folder, device="cpu"))
    model.mteb_model_meta.modalities = ["text", "image"]  # it believes that every such model is for text alone
    task = mteb.get_task("VidoreArxivQARetrieval").metadata  # names a kind of input; nothing is loaded
    vectors = np.empty((len(contents), model.model.get_embedding_dimension()), np.float32)
    for columns in MTEB_COLUMNS:
        places = [place for place, content in enumerate(contents) if _columns(content) == columns]
        if not places:
            continue
        values = [[_value(segment) for segment in contents[place]] for place in places]
        rows = Dataset.from_dict(dict(zip(columns, map(list, zip(*values, strict=True)), strict=True)))
        batches = DataLoader(rows, batch_size=BATCH, collate_fn=_listed)
        vectors[places] = model.encode(
            batches, task_metadata=task, hf_split="test", hf_subset="default", show_progress_bar=False
        )
    return vectors


def fits_mteb(content: Content) -> bool:
    """A text, an image, or an image and then a text: what a row of an mteb task can say."""
    return _columns(content) in MTEB_COLUMNS


def seen_alike(content: Content) -> bool:
    """Whether its images look the same to all readers. Grey of more than 8 bits does not, and neither does a colour or an entry of
    the palette that stands for transparency, which is lost where a reader writes the image anew."""
    images = [Image.open(io.BytesIO(segment.image)) for segment in content if segment.image is not None]
    return not any(is_deep(image) or "transparency" in image.info for image in images)


def as_message(content: Content) -> list[dict]:
    """The content as chat templates take it, with its order kept: one message of parts, neighbouring texts joined by a blank line."""
    parts = []
    for is_text, segments in groupby(content, key=lambda segment: segment.image is None):
        if is_text:
            parts.append({"type": "text", "text": "\n\n".join(segment.text for segment in segments)})
        else:
            parts += [{"type": "image", "image": _value(segment)} for segment in segments]
    return [{"role": "user", "content": parts}]


def _value(segment: Segment) -> str | Image.Image:
    return segment.text if segment.image is None else ImageOps.exif_transpose(Image.open(io.BytesIO(segment.image)))


def _columns(content: Content) -> tuple[str, ...]:
    return tuple("text" if segment.image is None else "image" for segment in content)


def _listed(rows: list[dict]) -> dict[str, list]:
    return {column: [row[column] for row in rows] for column in rows[0]}
