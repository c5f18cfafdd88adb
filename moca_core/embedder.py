"""Embedder: a model folder, and text, images or both to unit vectors. The path that evaluation and users share."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from moca_core.attention import attention_of
from moca_core.backbone import load_backbone
from moca_core.data.masking import packed_stream
from moca_core.data.render import Rendered, Renderer, load_tokenizer
from moca_core.data.rows import pack_contents
from moca_core.model.encoder import Encoder
from moca_core.model.inputs import to_device
from moca_core.spec import read_spec
from moca_core.types import Content

WINDOW = 1024  # contents rendered and packed together: bounds the memory, not the result


class Embedder:
    """Encodes contents, checked beforehand (data/validate.py), with the model in `folder`, mean-pooled.

    `attention` is what the folder declares, and nothing here changes it: a base model is read as the causal model that it is.

    Args:
        max_tokens: longest sequence; longer contents are read up to it, at a paragraph or an image. Default: what the folder was
            exported with.
        pack_tokens: tokens in one forward pass; raises throughput, never changes a vector beyond rounding.
    """

    def __init__(
        self,
        folder: str,
        *,
        max_tokens: int | None = None,
        pack_tokens: int = 8192,
        device: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (
            torch.bfloat16 if self.device.type == "cuda" else torch.float32
        )  # the flash kernel needs 16 bit
        self.spec = read_spec(folder)
        model = load_backbone(folder, dtype).to(self.device).eval()
        self.attention = attention_of(model)
        self.encoder = Encoder(model.model, self.spec)
        longest = max_tokens or max(exported_length(folder), self.spec.max_image_tokens + 2)
        self.renderer = Renderer(load_tokenizer(str(Path(folder) / "tokenizer.json")), self.spec, longest)
        self.pack_tokens = max(pack_tokens, longest)

    @property
    def dimension(self) -> int:
        return self.spec.text_hidden

    def encode(self, contents: Sequence[Content]) -> np.ndarray:
        """Unit vectors [len(contents), dimension], float32, in the order given."""
        vectors = np.empty((len(contents), self.dimension), dtype=np.float32)
        for members, embeddings in self._encode_packs(contents):
            vectors[members] = embeddings
        return vectors

    @torch.inference_mode()
    def _encode_packs(self, contents: Sequence[Content]) -> Iterator[tuple[list[int], np.ndarray]]:
        for start in range(0, len(contents), WINDOW):
            rendered = [self._render(start + i, c) for i, c in enumerate(contents[start : start + WINDOW])]
            for members, row in pack_contents(rendered, self.spec, self.pack_tokens):
                stream = to_device(packed_stream(row, self.spec), self.spec, self.device)
                yield [start + i for i in members], self.encoder.embed(stream).cpu().numpy()

    def _render(self, position: int, content: Content) -> Rendered:
        try:
            return self.renderer.first(content)
        except ValueError as error:
            raise ValueError(f"content {position}: {error}") from None


def exported_length(folder: str) -> int:
    """The longest input that the folder declares, at most 8192 (a base model's tokenizer claims far more than it was trained on)."""
    declared = json.loads((Path(folder) / "tokenizer_config.json").read_text()).get("model_max_length", 2048)
    return int(min(declared, 8192))
