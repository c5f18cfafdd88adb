"""The gate of export: what other libraries compute from the folder must be what was trained, or the folder is not let out."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from moca_core.attention import attention_of
from moca_core.embedder import Embedder
from moca_core.readers import Reader, fits_mteb, seen_alike, with_mteb, with_sentence_transformers, with_transformers
from moca_core.types import Attention, Content

LEAST_COSINE = {"float32": 0.9999, "bfloat16": 0.999}  # by the type of the folder's weights


class ParityError(RuntimeError):
    """The exported folder does not embed as the trained model does."""


def check_export(folder: str, trained: Embedder, contents: Sequence[Content]) -> dict[str, float]:
    """The lowest cosine, per reader, between the trained model's vectors and those that the reader computes from `folder`.

    Readers: this project's packed encoder, transformers (AutoModel and AutoProcessor), sentence-transformers and mteb, all of which pad.
    Of the contents, those count that all of them can read alike (`comparable`). Raises ParityError where a cosine is below that
    of LEAST_COSINE, where nothing can be compared, or where attention is not that of the trained model.
    """
    contents = [content for content in contents if comparable(content, trained)]
    if not contents:
        raise ParityError(
            f"{folder}: no content to compare by; each is longer than {trained.renderer.max_tokens} tokens, names a special one, or "
            "shows an image that others see otherwise (grey of 16 bits or floats, a transparent colour)"
        )
    least = LEAST_COSINE[json.loads(Path(folder, "config.json").read_text())["dtype"]]
    reference = trained.encode(contents)

    def lowest(reader: Reader, places: Sequence[int]) -> float:
        vectors = reader(folder, [contents[place] for place in places])
        lengths = np.linalg.norm(vectors, axis=1)  # not 1 where sentence-transformers normalises in 16 bits
        return float(((vectors * reference[places]).sum(1) / lengths).min())

    def packed(folder: str, contents: Sequence[Content]) -> np.ndarray:
        return Embedder(folder, max_tokens=trained.renderer.max_tokens, device="cpu").encode(contents)

    everything = list(range(len(contents)))
    readers = {"packed": packed, "transformers": with_transformers, "sentence_transformers": with_sentence_transformers}
    cosines = {name: lowest(reader, everything) for name, reader in readers.items()}
    if said_in_rows := [place for place in everything if fits_mteb(contents[place])]:
        cosines["mteb"] = lowest(with_mteb, said_in_rows)
    if low := {name: cosine for name, cosine in cosines.items() if not cosine >= least}:
        raise ParityError(f"{folder}: cosine to the trained model {low}, at least {least} is needed")
    check_attention(folder, trained.attention)
    return cosines


def comparable(content: Content, trained: Embedder) -> bool:
    """Whether it is short enough for nobody to cut it (each cuts in another place), holds no word that is a special token
    (others read it as one, while here it is text), and no image that others see otherwise."""
    special = trained.renderer.tokenizer.get_added_tokens_decoder().values()
    texts = "".join(segment.text or "" for segment in content)
    plain = seen_alike(content) and not any(token.content in texts for token in special)
    return plain and len(trained.renderer.pieces(content)) == 1


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
