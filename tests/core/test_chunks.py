"""Parts of a stream: all of it once, in order, as even as can be, and embedded as the whole is."""

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from samples import CONTENTS, image, stream_of, text, words

from moca_core.attention import set_attention
from moca_core.backbone import load_backbone
from moca_core.data.chunks import cut, parts_needed
from moca_core.model.encoder import Encoder
from moca_core.model.inputs import to_device

MORE = (*CONTENTS, (text(words(40, 7)),), (image(56, 56, 8), image(84, 56, 9)), *((text(words(n, n)),) for n in (3, 8)))


@pytest.fixture(scope="module")
def stream(renderer):
    return stream_of(MORE, renderer)


def lengths_of(parts):
    return [len(part.input_ids) for part in parts]


@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_parts_are_the_stream_without_a_copy(stream, spec, count):
    parts = cut(stream, count, spec)
    assert len(parts) == count
    for name, axis in (("input_ids", 0), ("position_ids", 1), ("pixels", 0), ("grid_thw", 0)):
        whole = getattr(stream, name)
        joined = np.concatenate([getattr(part, name) for part in parts], axis=axis)
        np.testing.assert_array_equal(joined, whole)
        assert all(np.shares_memory(getattr(p, name), whole) for p in parts if getattr(p, name).size)
    lengths = np.concatenate([np.diff(part.cu_seqlens) for part in parts])
    np.testing.assert_array_equal(lengths, np.diff(stream.cu_seqlens))
    for part in parts:
        assert part.cu_seqlens[0] == 0 and part.cu_seqlens[-1] == len(part.input_ids)
        assert part.cu_seqlens.dtype == stream.cu_seqlens.dtype
        assert (part.input_ids == spec.image_token_id).sum() * 4 == len(part.pixels) == part.grid_thw.prod(1).sum()


def test_the_longest_part_is_as_short_as_can_be(stream, spec):
    ends = stream.cu_seqlens.tolist()
    for count in range(1, len(MORE) + 1):
        ways = combinations(ends[1:-1], count - 1)
        best = min(max(b - a for a, b in pairwise([0, *inner, ends[-1]])) for inner in ways)
        parts = cut(stream, count, spec)
        assert max(lengths_of(parts)) == best and min(lengths_of(parts)) > 0


def test_more_parts_than_sequences_repeat_the_shortest(stream, spec):
    parts = cut(stream, len(MORE) + 2, spec)
    shortest = np.diff(stream.cu_seqlens).argmin()
    for part in parts[len(MORE) :]:
        np.testing.assert_array_equal(part.input_ids, parts[shortest].input_ids)
        assert len(part.cu_seqlens) == 2


def test_parts_needed_keep_the_budget_and_fewer_would_not(stream, spec):
    longest = int(np.diff(stream.cu_seqlens).max())
    total = len(stream.input_ids)
    assert parts_needed(stream, total) == 1 and parts_needed(stream, total - 1) == 2
    for budget in range(longest, total, 7):
        count = parts_needed(stream, budget)
        assert max(lengths_of(cut(stream, count, spec))) <= budget
        assert count == 1 or max(lengths_of(cut(stream, count - 1, spec))) > budget
        assert max(lengths_of(cut(stream, count + 1, spec))) <= budget  # another rank may need more
    assert parts_needed(stream, 1) == parts_needed(stream, longest)


@torch.no_grad()
def test_parts_are_embedded_as_the_whole_is(folder, stream, spec):
    model = load_backbone(folder)
    set_attention(model, "bidirectional")
    encoder, device = Encoder(model.model, spec), torch.device("cpu")
    whole = encoder.embed(to_device(stream, spec, device))
    parts = [encoder.embed(to_device(part, spec, device)) for part in cut(stream, 4, spec)]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-6, rtol=1e-5)
