"""Embedder: a model folder, and text, images or both to unit vectors. The path that evaluation and users share."""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

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
from moca_core.types import Content, TokenStream

WINDOW = 1024  # contents rendered and packed together: bounds the memory, not the result
GPU_PACK_TOKENS, CPU_PACK_TOKENS = (
    8192,
    1024,
)  # a CPU computes what fits its cache a tenth faster; small packs share out well
PREPARING_THREADS = 4  # beside a GPU: decoding and resizing let go of the interpreter

Item = TypeVar("Item")
Made = TypeVar("Made")


class Embedder:
    """Encodes contents, checked beforehand (data/validate.py), with the model in `folder`, mean-pooled.

    On a GPU threads prepare packs ahead of the model. On a CPU as many packs as torch has threads are embedded side by side, by one thread
    each: small matrices share out badly among threads, and worse where other work wants the cores.

    `attention` is what the folder declares, and nothing here changes it: a base model is read as the causal model that it is.

    Args:
        max_tokens: longest sequence; longer contents are read up to it, at a paragraph or an image. Default: what the folder was
            exported with.
        pack_tokens: tokens in one forward pass, more only where a content is longer; changes the speed, never a vector beyond rounding.
    """

    def __init__(
        self,
        folder: str,
        *,
        max_tokens: int | None = None,
        pack_tokens: int | None = None,
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
        self.on_gpu = self.device.type == "cuda"
        self.pack_tokens = pack_tokens or (GPU_PACK_TOKENS if self.on_gpu else CPU_PACK_TOKENS)

    @property
    def dimension(self) -> int:
        return self.spec.text_hidden

    def encode(self, contents: Sequence[Content]) -> np.ndarray:
        """Unit vectors [len(contents), dimension], float32, in the order given."""
        vectors = np.empty((len(contents), self.dimension), dtype=np.float32)
        for members, embeddings in self._encode_packs(contents):
            vectors[members] = embeddings
        return vectors

    def _encode_packs(self, contents: Sequence[Content]) -> Iterator[tuple[list[int], np.ndarray]]:
        packs = self._packs(contents)
        threads = PREPARING_THREADS if self.on_gpu else torch.get_num_threads()
        if threads == 1 or len(contents) == 1:  # of one content all threads share the matrices
            yield from ((members, self._embed(self._stream(row))) for members, row in packs)
            return

        def made(pack: tuple[list[int], dict]) -> tuple[list[int], TokenStream | np.ndarray]:
            stream = self._stream(pack[1])
            return pack[0], stream if self.on_gpu else self._embed(stream)

        alone = None if self.on_gpu else partial(torch.set_num_threads, 1)
        try:
            with ThreadPoolExecutor(threads, initializer=alone) as pool:
                for members, result in in_order(pool, made, packs, 2 * threads):
                    yield members, self._embed(result) if self.on_gpu else result
        finally:
            if not self.on_gpu:  # what a thread of the pool sets for itself is what threads that start later begin with
                torch.set_num_threads(threads)

    def _packs(self, contents: Sequence[Content]) -> Iterator[tuple[list[int], dict]]:
        for start in range(0, len(contents), WINDOW):
            rendered = [self._render(start + i, c) for i, c in enumerate(contents[start : start + WINDOW])]
            budget = max(self.pack_tokens, *map(len, rendered))
            for members, row in pack_contents(rendered, self.spec, budget):
                yield [start + i for i in members], row

    def _stream(self, row: dict) -> TokenStream:
        return packed_stream(row, self.spec)

    @torch.inference_mode()
    def _embed(self, stream: TokenStream) -> np.ndarray:
        return self.encoder.embed(to_device(stream, self.spec, self.device)).cpu().numpy()

    def _render(self, position: int, content: Content) -> Rendered:
        try:
            return self.renderer.first(content)
        except ValueError as error:
            raise ValueError(f"content {position}: {error}") from None


def in_order(pool: ThreadPoolExecutor, fn: Callable[[Item], Made], items: Iterable[Item], ahead: int) -> Iterator[Made]:
    """fn(item) for every item, made by the pool, at most `ahead` of them before they are asked for."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(fn, item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    yield from (made.result() for made in waiting)


def exported_length(folder: str) -> int:
    """The longest input that the folder declares, at most 8192 (a base model's tokenizer claims far more than it was trained on)."""
    declared = json.loads((Path(folder) / "tokenizer_config.json").read_text()).get("model_max_length", 2048)
    return int(min(declared, 8192))
