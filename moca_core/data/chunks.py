"""A packed stream cut between sequences into parts that fit where the whole does not. Views only: nothing is copied."""

import numpy as np

from moca_core.spec import BackboneSpec
from moca_core.types import TokenStream


def parts_needed(stream: TokenStream, budget_tokens: int) -> int:
    """The fewest parts of at most this many tokens; a sequence that is longer by itself is a part of its own."""
    return len(_starts(_ends(stream), max(budget_tokens, _longest(stream))))


def cut(stream: TokenStream, count: int, spec: BackboneSpec) -> list[TokenStream]:
    """`count` parts in order, the longest of them (in tokens) as short as can be.

    Where there are fewer sequences than parts, the last ones are the shortest sequence again: no part is empty.
    """
    ends = _ends(stream)
    parts = min(count, len(ends))
    low, high = max(_longest(stream), -(-int(ends[-1]) // parts)), int(ends[-1])
    while low < high:  # fewer parts need more room
        middle = (low + high) // 2
        low, high = (low, middle) if len(_starts(ends, middle)) <= parts else (middle + 1, high)
    starts = _starts(ends, low, parts)
    shortest = int(np.diff(stream.cu_seqlens).argmin())
    runs = list(zip(starts, [*starts[1:], len(ends)], strict=True))
    runs += [(shortest, shortest + 1)] * (count - parts)
    return [_part(stream, first, last, spec) for first, last in runs]


def _ends(stream: TokenStream) -> np.ndarray:
    return stream.cu_seqlens[1:].astype(np.int64)


def _longest(stream: TokenStream) -> int:
    return int(np.diff(stream.cu_seqlens).max())


def _starts(ends: np.ndarray, room_tokens: int, parts: int = 0) -> list[int]:
    """First sequence of every part, each as full as the room allows; at least `parts` of them where there are as many sequences."""
    starts, first = [], 0
    while first < len(ends):
        starts.append(first)
        taken = int(ends[first - 1]) if first else 0
        fits = int(np.searchsorted(ends, taken + room_tokens, side="right"))
        first = max(first + 1, min(fits, len(ends) - (parts - len(starts))))
    return starts


def _part(stream: TokenStream, first: int, last: int, spec: BackboneSpec) -> TokenStream:
    """Sequences first to last - 1, with their images."""
    start, end = (int(stream.cu_seqlens[n]) for n in (first, last))
    is_image = stream.input_ids == spec.image_token_id
    patches_before, patches = (
        spec.group_size * int(is_image[slice(*span)].sum()) for span in ((0, start), (start, end))
    )
    image_ends = stream.grid_thw.prod(axis=1).cumsum()
    images = slice(*np.searchsorted(image_ends, [patches_before, patches_before + patches], side="right"))
    return TokenStream(
        input_ids=stream.input_ids[start:end],
        cu_seqlens=stream.cu_seqlens[first : last + 1] - stream.cu_seqlens[first],
        position_ids=stream.position_ids[:, start:end],
        pixels=stream.pixels[patches_before : patches_before + patches],
        grid_thw=stream.grid_thw[images],
    )
