"""Rendering: from texts and images to token ids with the image placeholders already expanded.

The format is the plainest there is: texts as they are, every image between the vision start and end tokens. It is also the
chat template of the exported model, so that training and serving see the same tokens.
"""

from dataclasses import dataclass
from functools import lru_cache

from tokenizers import Tokenizer

from moca_core.data.image_files import header_size
from moca_core.data.images import grid_thw
from moca_core.spec import BackboneSpec
from moca_core.types import Content, Segment


@dataclass(frozen=True)
class Rendered:
    """Token ids of one sequence; the bytes and the patch grids of its images, in order of appearance."""

    input_ids: list[int]
    images: list[bytes]
    grids: list[tuple[int, int, int]]

    def __len__(self) -> int:
        return len(self.input_ids)


@lru_cache(maxsize=4)
def load_tokenizer(path: str) -> Tokenizer:
    """tokenizer.json as a tokenizer that reads literal special tokens in user text as ordinary characters."""
    tokenizer = Tokenizer.from_file(path)
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class Renderer:
    """Turns content into sequences of at most `max_tokens`, for one tokenizer and one backbone."""

    def __init__(self, tokenizer: Tokenizer, spec: BackboneSpec, max_tokens: int) -> None:
        if max_tokens < spec.max_image_tokens + 2:
            raise ValueError(
                f"max_tokens={max_tokens} cannot hold one image of max_image_px={spec.max_image_px}, which is up to "
                f"{spec.max_image_tokens} tokens and 2 more around it; raise the one or lower the other"
            )
        self.tokenizer, self.spec, self.max_tokens = tokenizer, spec, max_tokens

    def pieces(self, content: Content) -> list[Rendered]:
        """The whole content, in order, as few sequences as the budget allows.

        A sequence ends at a paragraph or an image; only a paragraph longer than the budget is cut, between tokens.
        """
        segments = self._segments(content)
        atoms = [self._atom(text, image) for text, image in segments]
        if sum(map(len, atoms)) > self.max_tokens:
            atoms = [piece for text, image in segments for piece in self._paragraphs(text, image)]
        groups: list[list[Rendered]] = [[]]
        tokens = 0  # of the last group
        for atom in atoms:
            if tokens + len(atom) > self.max_tokens:
                groups.append([])
                tokens = 0
            groups[-1].append(atom)
            tokens += len(atom)
        return [piece for piece in map(_join, groups) if len(piece)]

    def first(self, content: Content) -> Rendered:
        """The first sequence of the content: all of it where it fits the budget. Raises ValueError for empty content."""
        pieces = self.pieces(content)
        if not pieces:
            raise ValueError("empty, no text and no image")
        return pieces[0]

    def length(self, segment: Segment) -> int:
        """Tokens of a segment by itself."""
        return len(self._atom(segment.text or "", segment.image))

    def _segments(self, content: Content) -> list[tuple[str, bytes | None]]:
        """Neighbouring texts joined by a blank line, so that text is tokenized as it will be read."""
        joined: list[tuple[str, bytes | None]] = []
        for segment in content:
            if segment.text is None:
                joined.append(("", segment.image))
            elif joined and joined[-1][1] is None:
                joined[-1] = (f"{joined[-1][0]}\n\n{segment.text}", None)
            else:
                joined.append((segment.text, None))
        return joined

    def _atom(self, text: str, image: bytes | None) -> Rendered:
        if image is None:
            return Rendered(self.tokenizer.encode(text, add_special_tokens=False).ids, [], [])
        grid = grid_thw(*header_size(image), self.spec)
        placeholders = [self.spec.image_token_id] * self.spec.image_tokens(grid)
        ids = [self.spec.vision_start_token_id, *placeholders, self.spec.vision_end_token_id]
        return Rendered(ids, [image], [grid])

    def _paragraphs(self, text: str, image: bytes | None) -> list[Rendered]:
        if image is not None:
            return [self._atom(text, image)]
        paragraphs = text.split("\n\n")
        texts = [p + "\n\n" for p in paragraphs[:-1]] + paragraphs[-1:]
        ids = [self.tokenizer.encode(t, add_special_tokens=False).ids for t in texts]
        return [Rendered(i[k : k + self.max_tokens], [], []) for i in ids for k in range(0, len(i), self.max_tokens)]


def _join(parts: list[Rendered]) -> Rendered:
    return Rendered(
        [i for part in parts for i in part.input_ids],
        [image for part in parts for image in part.images],
        [grid for part in parts for grid in part.grids],
    )
