"""Our embedder behind mteb's interface for encoders: any task of mteb, read as this project reads."""

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from moca_core.benchmarks import Prompts
from moca_core.embedder import Embedder
from moca_core.types import Content, Segment

if TYPE_CHECKING:
    import torch
    from mteb.models import ModelMeta

MODES = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")  # that a PNG has: nothing is lost on the way


class MtebEncoder:
    """mteb's `EncoderProtocol`. A row's image stands before its text, as everywhere here.

    mteb knows prompts of its own for some tasks; only `prompts` are used, as they belong to the model.
    """

    def __init__(self, embedder: Embedder, name: str, revision: str, prompts: Prompts) -> None:
        self.embedder, self.name, self.revision, self.prompts = embedder, name, revision, prompts

    @property
    def mteb_model_meta(self) -> "ModelMeta":
        from mteb.models import ModelMeta

        about = {"name": self.name, "revision": self.revision, "modalities": ["text", "image"]}
        return ModelMeta.create_empty(about | {"embed_dim": self.embedder.dimension})

    def encode(self, inputs: Iterable[dict[str, list]], *, prompt_type: Any = None, **about: Any) -> np.ndarray:
        """Unit vectors [rows, dimension] of the rows of all batches, in order. `about` says which task asks, which changes nothing."""
        side = getattr(prompt_type, "value", prompt_type)
        prompts = self.prompts if side in ("query", "document") else Prompts()
        vectors = []
        for batch in inputs:
            contents = contents_of(batch)
            vectors.append(self.embedder.encode([prompts.put(c, query=side == "query") for c in contents]))
        return np.concatenate(vectors)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> "torch.Tensor":
        """Cosines [N, M]."""
        import torch

        return torch.as_tensor(embeddings1) @ torch.as_tensor(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> "torch.Tensor":
        """Cosines [N]."""
        import torch

        return (torch.as_tensor(embeddings1) * torch.as_tensor(embeddings2)).sum(-1)


def contents_of(batch: dict[str, list]) -> list[Content]:
    """The rows of a batch of mteb. Raises ValueError where one has neither text nor image."""
    rows = len(next(iter(batch.values())))
    texts, images = (batch.get(column) or [None] * rows for column in ("text", "image"))
    contents = []
    for text, image in zip(texts, images, strict=True):
        shown = (Segment(image=_png(image)),) if image is not None else ()
        contents.append((*shown, Segment(text=text)) if text else shown)
    if not all(contents):
        raise ValueError("mteb: a row with neither text nor image; this model reads these two and nothing else")
    return contents


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    (image if image.mode in MODES else image.convert("RGB")).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
