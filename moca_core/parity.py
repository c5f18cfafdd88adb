"""The gate of export: what other libraries compute from the folder must be what was trained, or the folder is not let out."""

import io

import numpy as np
import torch
from PIL import Image

from moca_core.attention import attention_of
from moca_core.embedder import Embedder
from moca_core.types import Attention, Content

MIN_COSINE = 0.999


class ParityError(RuntimeError):
    """The exported folder does not embed as the trained model does."""


def check_export(folder: str, trained: Embedder, contents: list[Content]) -> dict[str, float]:
    """The lowest cosine, per reader, between the trained model's vectors and those that the reader computes from `folder`.

    Readers: this project's packed encoder, and sentence-transformers (transformers' AutoModel and processor, sdpa attention, padded
    batches). Raises ParityError where one is below MIN_COSINE, or where attention is not that of the trained model.
    """
    reference = trained.encode(contents)
    readers = {
        "packed": Embedder(folder, max_tokens=trained.renderer.max_tokens, device="cpu").encode(contents),
        "sentence_transformers": encode_with_sentence_transformers(folder, contents),
    }
    lowest = {name: float((vectors * reference).sum(1).min()) for name, vectors in readers.items()}
    low = {name: cosine for name, cosine in lowest.items() if not cosine >= MIN_COSINE}
    if low:
        raise ParityError(f"{folder}: cosine to the trained model {low}, at least {MIN_COSINE} is needed")
    check_attention(folder, trained.attention)
    return lowest


def encode_with_sentence_transformers(folder: str, contents: list[Content]) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device="cpu")
    return model.encode([as_message(content) for content in contents], batch_size=8, show_progress_bar=False)


def as_message(content: Content) -> list[dict]:
    """The content as sentence-transformers takes it with its order kept: one chat message of parts."""
    parts = [
        {"type": "text", "text": s.text}
        if s.image is None
        else {"type": "image", "image": Image.open(io.BytesIO(s.image))}
        for s in content
    ]
    return [{"role": "user", "content": parts}]


@torch.inference_mode()
def check_attention(folder: str, trained: Attention) -> None:
    """Raises ParityError unless a plain AutoModel attends as the model was trained to, and the folder says so to every reader.

    Cosines alone do not tell: contents of one token are the same both ways. The last token of a text moves its first hidden
    state if and only if attention is bidirectional.
    """
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder).eval()
    serving = "causal" if getattr(model.config, "is_causal", True) else "bidirectional"  # what serving engines read
    for place, declared in (("config.json", serving), ("its text_config", attention_of(model))):
        if declared != trained:
            raise ParityError(f"{folder}: {place} declares {declared} attention, the trained model's is {trained}")
    ids = torch.arange(1, 9)[None]
    other = ids.clone()
    other[0, -1] += 1
    first, moved = (model(input_ids=x).last_hidden_state[0, 0] for x in (ids, other))
    found = "causal" if torch.equal(first, moved) else "bidirectional"
    if found != trained:
        raise ParityError(f"{folder}: attention is {found} in transformers, the trained model's is {trained}")
