"""The nouns of the system, in the order in which a document meets them.

Shapes: T text and image tokens of one pack, S segments (documents in a pack), N images, P vision patches,
G merged groups of patches (one group is one image token), B queries on this rank, C candidates on this rank.
No torch here: the data side of the system runs in many small processes that never need it.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Segment:
    """One piece of a document: a text, or an image as the bytes of its file (PNG, JPEG, ...)."""

    text: str | None = None
    image: bytes | None = None

    def __post_init__(self) -> None:
        assert (self.text is None) != (self.image is None), "a segment is either a text or an image"


Content = tuple[Segment, ...]
"""Text and images in reading order: the body of a document, or one side of a pair."""


def content_id(content: Content) -> str:
    """Stable 128-bit hash (32 hex digits) of what a content says: same texts and image bytes, same id, on any machine."""
    digest = hashlib.sha256()
    for segment in content:
        payload = segment.image if segment.text is None else segment.text.encode()
        digest.update(b"%c%d:" % (b"i" if segment.text is None else b"t", len(payload)))
        digest.update(payload)
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class Document:
    """One unlabeled document of interleaved text and images. `source` names the corpus it came from, `where` its file and
    row, by which a person finds it again: it is no part of what the document is."""

    source: str
    content: Content
    where: str = field(default="", compare=False)

    @property
    def doc_id(self) -> str:
        return content_id(self.content)


@dataclass(frozen=True)
class Rejected:
    """A row that cannot be used: counted by `reason` (a short snake_case word), kept aside with `detail` and `where`."""

    reason: str
    detail: str
    where: str


@dataclass(frozen=True)
class Pair:
    """A query, its right answers (at least one) and answers known to be wrong.

    `source` is the task: a batch holds one task. `group` names the answer where different contents are the same
    answer (two pictures of a seven): members of one group are never each other's negatives. Without it the group
    is the content of the answer. `where` is the file and row it came from.
    """

    source: str
    query: Content
    positives: tuple[Content, ...]
    negatives: tuple[Content, ...] = ()
    group: str | None = None
    where: str = field(default="", compare=False)

    @property
    def answers(self) -> tuple[Content, ...]:
        """Right ones, then wrong ones."""
        return self.positives + self.negatives


@dataclass(frozen=True)
class Query:
    """A question of an evaluation task. `positives` and `candidates` are positions in the task's candidates;
    `candidates=None` means that it is asked against all of them. `grades` say how right each of the positives is; None: all the same.
    """

    content: Content
    positives: tuple[int, ...]
    candidates: tuple[int, ...] | None = None
    grades: tuple[float, ...] | None = None


@dataclass(frozen=True)
class EvalTask:
    """Held-out queries and the candidates they choose from."""

    name: str
    queries: tuple[Query, ...]
    candidates: tuple[Content, ...]


Attention = Literal["bidirectional", "causal"]
"""Which tokens of its sequence a token sees."""


@dataclass
class TokenStream:
    """Several sequences laid end to end, without padding: what the encoder reads.

    `cu_seqlens` [S+1] holds the start of every sequence and the end of the last. `position_ids` [4, T] holds one text
    row that restarts at every sequence, then the three rows of mRoPE (time, height, width). `pixels` [P, patch_values]
    are uint8 patches in the order of the vision tower (merged groups together); normalising happens on the device.
    """

    input_ids: np.ndarray  # [T] int64
    cu_seqlens: np.ndarray  # [S+1] int32
    position_ids: np.ndarray  # [4, T] int64
    pixels: np.ndarray  # [P, patch_values] uint8
    grid_thw: np.ndarray  # [N, 3] int64, in patches


@dataclass
class MaskedBatch:
    """One pack, masked: a micro-batch of continual pre-training.

    `labels` [T] holds the original id at masked text positions and -100 elsewhere, at the position of the masked token
    itself (the loss does the shift). `masked_groups` [G] marks the groups of patches to be replaced by noise, drawn from the seed of
    their sequence in `noise_seeds` [S]; by these sequences are known, also where nothing is masked, and 0 is none of them.
    """

    stream: TokenStream
    labels: np.ndarray  # [T] int64
    masked_groups: np.ndarray  # [G] bool
    noise_seeds: np.ndarray  # [S] int64

    @property
    def rows(self) -> int:
        """Sequences trained on: none in a blank batch."""
        return int(np.count_nonzero(self.noise_seeds))

    @property
    def content(self) -> int:
        """A number that is the sum over its sequences of what identifies them, wherever they lie."""
        return int((self.noise_seeds % 2**32).sum())


@dataclass
class PairBatch:
    """This rank's share of a contrastive batch: all queries, then every query's candidates, as one stream.

    The first B sequences are queries, the C behind them candidates: right answers (`candidate_positive`, at least one to every query)
    and wrong ones, each of them listed for the query `candidate_owner`. Ranks may hold different numbers of both.
    `candidate_group` and `candidate_content` identify answers, so that equal answers are never each other's negatives: the content is
    known of all of them, the group of positives alone (a negative's is its content). `candidate_query` identifies the query that a
    positive answers (0 for negatives), so that two right answers to one question are not either. `source` is each query's task, by its
    place among the sorted names of all.
    """

    stream: TokenStream
    num_queries: int
    candidate_owner: np.ndarray  # [C] int64, of 0 to B - 1
    candidate_positive: np.ndarray  # [C] bool
    candidate_group: np.ndarray  # [C] int64
    candidate_content: np.ndarray  # [C] int64
    candidate_query: np.ndarray  # [C] int64
    source: np.ndarray  # [B] int64

    @property
    def rows(self) -> int:
        """Pairs trained on."""
        return self.num_queries

    @property
    def content(self) -> int:
        """A number that is the sum over its candidates of what identifies them, on whatever ranks they are."""
        return int(((self.candidate_content ^ self.candidate_query) % 2**32).sum())
