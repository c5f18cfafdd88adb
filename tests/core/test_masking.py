"""Masks: a pure function of (seed, epoch, piece), in the right share; labels are what was there."""

import hashlib

import numpy as np
import pytest
import torch
from samples import CONTENTS, image, row_of, text, words

from moca_core.data.masking import IGNORED, mask, next_token, packed_stream
from moca_core.data.rows import packed_row, sequence_row
from moca_core.model.inputs import unit_noise
from moca_core.rng import generator, seed_of

CONTENT = CONTENTS[2]
RATIOS = {"mlm_ratio": 0.4, "mae_ratio": 0.5}


def pack_of(renderer, named):
    rows = [sequence_row(name, renderer.first(content)) for name, content in named]
    return packed_row(rows, renderer.spec)


def test_a_mask_is_the_same_whatever_the_pack(renderer, spec):
    packs = [
        [("me", CONTENT)],
        [("a", CONTENTS[3]), ("me", CONTENT), ("b", CONTENTS[0])],
        [("b", CONTENTS[0]), ("a", CONTENTS[1]), ("me", CONTENT)],
    ]
    seen = []
    for named in packs:
        row = pack_of(renderer, named)
        batch = mask(row, spec, seed=1, epoch=2, **RATIOS)
        place = row["piece_ids"].index("me")
        start, end = batch.stream.cu_seqlens[place : place + 2]
        is_image = batch.stream.input_ids == spec.image_token_id
        groups = batch.masked_groups[is_image[:start].sum() : is_image[:end].sum()]
        seen.append((batch.stream.input_ids[start:end], batch.labels[start:end], groups))
    for other in seen[1:]:
        for mine, theirs in zip(seen[0], other, strict=True):
            np.testing.assert_array_equal(mine, theirs)
    assert seen[0][2].any() and (seen[0][1] >= 0).any()


@pytest.mark.parametrize("change", [{"seed": 2}, {"epoch": 3}, {"name": "other"}])
def test_seed_epoch_and_piece_each_change_the_mask(renderer, spec, change):
    def of(seed=1, epoch=2, name="me"):
        row = pack_of(renderer, [(name, CONTENTS[3] + CONTENTS[0])])
        return mask(row, spec, seed=seed, epoch=epoch, **RATIOS)

    first, again, other = of(), of(), of(**change)
    np.testing.assert_array_equal(first.labels, again.labels)
    np.testing.assert_array_equal(first.masked_groups, again.masked_groups)
    assert (first.noise_seeds == again.noise_seeds).all() and (first.noise_seeds != other.noise_seeds).all()
    assert (first.labels != other.labels).any() and (first.masked_groups != other.masked_groups).any()


@pytest.mark.parametrize(("mlm_ratio", "mae_ratio"), [(0.4, 0.5), (0.15, 0.75), (0.0, 0.0), (1.0, 1.0)])
def test_shares_are_right_and_only_plain_text_is_masked(renderer, spec, mlm_ratio, mae_ratio):
    named = [(f"{i}", (text(words(40, i)), image(196, 196, i), text(words(30, i + 1)))) for i in range(60)]
    row = pack_of(renderer, named)
    before = np.asarray(row["input_ids"])
    batch = mask(row, spec, seed=5, epoch=0, mlm_ratio=mlm_ratio, mae_ratio=mae_ratio)
    first = np.zeros(len(before), dtype=bool)
    first[np.cumsum([0, *row["segment_lengths"][:-1]])] = True
    may = ~np.isin(before, spec.special_token_ids) & ~first
    masked = batch.labels != IGNORED
    assert not masked[~may].any()
    np.testing.assert_array_equal(batch.labels[masked], before[masked])
    assert (batch.stream.input_ids[masked] == spec.mask_token_id).all()
    np.testing.assert_array_equal(batch.stream.input_ids[~masked], before[~masked])
    for flags, ratio in ((masked[may], mlm_ratio), (batch.masked_groups, mae_ratio)):
        assert len(flags) > 2500
        assert abs(flags.mean() - ratio) <= 4 * np.sqrt(ratio * (1 - ratio) / len(flags))
    assert len(batch.masked_groups) == (before == spec.image_token_id).sum()


def test_neighbouring_tokens_are_masked_independently(renderer, spec):
    row = pack_of(renderer, [(f"{i}", (text(words(200, i)),)) for i in range(20)])
    masked = mask(row, spec, seed=5, epoch=0, **RATIOS).labels != IGNORED
    pairs = np.corrcoef(masked[:-1], masked[1:])[0, 1]
    assert abs(pairs) < 0.06
    pieces = np.split(masked, np.cumsum(row["segment_lengths"])[:-1])
    assert not np.array_equal(pieces[0][1:150], pieces[1][1:150])


def test_unmasked_stream_is_left_alone(renderer, spec):
    row = row_of(CONTENTS, renderer)
    stream, batch = packed_stream(row, spec, fast=True), mask(row, spec, seed=1, epoch=0, **RATIOS)
    for name in ("cu_seqlens", "position_ids", "pixels", "grid_thw"):
        np.testing.assert_array_equal(getattr(stream, name), getattr(batch.stream, name))
    assert stream.pixels.dtype == np.uint8
    assert len(stream.pixels) == stream.grid_thw.prod(1).sum()


def test_next_token_labels_every_plain_token_but_the_first(renderer, spec):
    row = row_of(CONTENTS, renderer)
    batch = next_token(row, spec, seed=1, epoch=0)
    ids = np.asarray(row["input_ids"])
    np.testing.assert_array_equal(batch.stream.input_ids, ids)
    starts = set(np.cumsum([0, *row["segment_lengths"]]).tolist())
    for place, (token, label) in enumerate(zip(ids, batch.labels, strict=True)):
        expected = IGNORED if token in spec.special_token_ids or place in starts else token
        assert label == expected
    assert not batch.masked_groups.any() and len(batch.masked_groups) == (ids == spec.image_token_id).sum()


def test_what_is_consumed_is_told_with_and_without_masks(renderer, spec):
    row, other = row_of(CONTENTS, renderer), row_of(CONTENTS[:2], renderer)
    key = {"seed": 1, "epoch": 0}
    plain, masked = next_token(row, spec, **key), mask(row, spec, **RATIOS, **key)
    assert (plain.rows, plain.content) == (masked.rows, masked.content) and plain.rows == len(CONTENTS)
    told = [
        next_token(other, spec, **key),
        next_token(row, spec, seed=1, epoch=1),
        next_token(row, spec, seed=2, epoch=0),
    ]
    assert len({plain.content, *(batch.content for batch in told)}) == 4


def test_keys_do_not_run_into_each_other():
    keys = [(1, 23), (12, 3), (123,), (1, 2, 3), ("1", "2", "3", ""), (0, 123)]
    assert len({seed_of(*k) for k in keys}) == len(keys)
    assert all(0 <= seed_of(*k) < 2**63 for k in keys)
    assert generator(1, "a").random() == generator(1, "a").random() != generator(1, "b").random()


def test_seeds_never_change_between_versions():
    """A mask that changes under a running training is a silent restart of its data."""
    assert seed_of(7, 0, "doc:1", "mask") == int(hashlib.sha256(b"7\x1f0\x1fdoc:1\x1fmask").hexdigest()[:16], 16) // 2


def test_every_masked_patch_gets_its_own_noise_from_the_seed_of_its_sequence(spec):
    like = torch.zeros(1, spec.patch_values * spec.temporal_patch_size)
    seeds, patches = np.array([7, 8, 9]), np.array([12, 0, 8])
    noise = unit_noise(seeds, patches, like)
    assert noise.shape == (20, like.shape[1])
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    correlation = torch.corrcoef(noise) - torch.eye(len(noise))
    assert correlation.abs().max() < 0.2  # no patch is a copy of another
    alone = [unit_noise(seeds[i : i + 1], patches[i : i + 1], like) for i in (2, 0)]
    assert torch.equal(torch.cat(alone[::-1]), noise)  # in whichever pack a sequence lies
    assert not torch.isclose(unit_noise(seeds + 1, patches, like), noise).all(1).any()
