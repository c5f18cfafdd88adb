"""What a model makes of a masked batch, for people to look at: images with their masked patches rebuilt, passages with words guessed.

Choosing what to look at is apart from looking: a Question goes through the forward pass of the objective
(objective/pretraining.py), its Answer comes back, and `images_of` and `passage_of` read both.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moca_core.spec import BackboneSpec
from moca_core.types import MaskedBatch

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PASSAGE_TOKENS = 48
GUESSES = 3


@dataclass(frozen=True)
class Question:
    """A masked batch, and which of its masked words to guess: their places [M] in the stream."""

    batch: MaskedBatch
    words: np.ndarray


@dataclass(frozen=True)
class Answer:
    """P masked patches as the model saw and rebuilt them, uint8 in the order of the stream; the M words' best guesses.

    None is what the objective has no part for.
    """

    seen: np.ndarray | None  # [P, patch_values] noise
    rebuilt: np.ndarray | None  # [P, patch_values]
    guesses: np.ndarray | None  # [M, GUESSES] token ids, the most probable first
    probabilities: np.ndarray | None  # [M, GUESSES]


@dataclass(frozen=True)
class RebuiltImage:
    """uint8 [height, width, channels]; `seen` and `rebuilt` differ from the original in masked patches alone."""

    original: np.ndarray
    seen: np.ndarray
    rebuilt: np.ndarray


@dataclass(frozen=True)
class Word:
    """A token of a passage as text; `guesses` are the model's for a masked one, with their probabilities."""

    text: str
    guesses: tuple[tuple[str, float], ...] = ()


def ask(batch: MaskedBatch, spec: BackboneSpec) -> Question:
    """To guess the masked words of one passage: the start of the longest run of text in the batch."""
    start, end = _passage(batch, spec)
    return Question(batch, start + np.flatnonzero(batch.labels[start:end] >= 0))


def _passage(batch: MaskedBatch, spec: BackboneSpec) -> tuple[int, int]:
    """(start, end) in the stream, of at most PASSAGE_TOKENS tokens of one sequence."""
    special = [token for token in spec.special_token_ids if token != spec.mask_token_id]
    is_text = ~np.isin(batch.stream.input_ids, special)
    edges = np.zeros(len(is_text) + 1, dtype=bool)  # where a run of one kind begins, or a sequence
    edges[batch.stream.cu_seqlens] = True
    edges[1:-1] |= is_text[1:] != is_text[:-1]
    places = np.flatnonzero(edges)
    lengths = np.diff(places) * is_text[places[:-1]]
    longest = int(lengths.argmax())
    return int(places[longest]), int(places[longest] + min(lengths[longest], PASSAGE_TOKENS))


def images_of(question: Question, answer: Answer, spec: BackboneSpec, most: int) -> list[RebuiltImage]:
    """At most so many of the batch's images that have masked patches, from all over it."""
    if answer.rebuilt is None:
        return []
    stream = question.batch.stream
    masked = question.batch.masked_groups.repeat(spec.group_size)  # [patches]
    seen, rebuilt = stream.pixels.copy(), stream.pixels.copy()
    seen[masked], rebuilt[masked] = answer.seen, answer.rebuilt
    ends = np.cumsum([0, *stream.grid_thw.prod(axis=1)])
    touched = [number for number in range(len(stream.grid_thw)) if masked[ends[number] : ends[number + 1]].any()]
    chosen = np.unique(np.linspace(0, len(touched) - 1, min(most, len(touched))).round().astype(int))
    return [
        RebuiltImage(
            *(
                unpatchify(pixels[ends[number] : ends[number + 1]], stream.grid_thw[number], spec)
                for pixels in (stream.pixels, seen, rebuilt)
            )
        )
        for number in (touched[place] for place in chosen)
    ]


def passage_of(question: Question, answer: Answer, tokenizer: "Tokenizer", spec: BackboneSpec) -> list[Word]:
    """The passage with the guesses of its masked words; nothing where it has none."""
    if answer.guesses is None or not len(question.words):
        return []
    guesses = {}
    for place, tokens, chances in zip(question.words, answer.guesses, answer.probabilities, strict=True):
        words = (tokenizer.decode([token]) for token in tokens.tolist())
        guesses[int(place)] = tuple(zip(words, chances.tolist(), strict=True))
    labels, ids = question.batch.labels, question.batch.stream.input_ids
    original = np.where(labels >= 0, labels, ids).tolist()
    places = range(*_passage(question.batch, spec))
    return [Word(tokenizer.decode([original[place]]), guesses.get(place, ())) for place in places]


def unpatchify(patches: np.ndarray, grid_thw: np.ndarray, spec: BackboneSpec) -> np.ndarray:
    """The image [height, width, channels] that data/images.py:patchify made the patches [P, patch_values] of."""
    patch, merge = spec.patch_size_px, spec.merge_size
    rows, columns = (int(side) // merge for side in grid_thw[1:])
    blocks = patches.reshape(rows, columns, merge, merge, spec.channels, patch, patch)
    side = patch * merge
    return blocks.transpose(0, 2, 5, 1, 3, 6, 4).reshape(rows * side, columns * side, spec.channels)
