"""What people are shown of a masked batch is what the model saw and said."""

import copy

import numpy as np
import pytest
import torch
from samples import CONTENTS, image, text, words
from test_pretraining_objective import batch_of, objective

from moca_core.data.images import patchify, read_patches
from moca_core.data.masking import blank
from moca_core.model.inputs import denormalise, first_frame, normalise, repeat_in_time, to_device, unit_noise
from moca_core.reconstruction import GUESSES, PASSAGE_TOKENS, Answer, Question, ask, images_of, passage_of, unpatchify
from tests.core.samples import picture


def masked_patches(question, spec):
    return question.batch.masked_groups.repeat(spec.group_size)


def masked_pixels(question, number, spec):
    """[height, width] of the batch's image: where the patches were masked, by another way than the code's: patchified masks."""
    grids = question.batch.stream.grid_thw
    start = sum(int(np.prod(grid)) for grid in grids[:number])
    patches = np.zeros((int(np.prod(grids[number])), spec.patch_values), np.uint8)
    patches[masked_patches(question, spec)[start : start + len(patches)]] = 255
    return unpatchify(patches, grids[number], spec)[..., 0] > 0


def test_patches_go_back_to_the_image(spec):
    size = (6 * spec.factor_px, 3 * spec.factor_px)
    original = picture(*size, seed=4)
    patches = patchify(original, spec, size=size)
    grid = np.array([1, size[1] // spec.patch_size_px, size[0] // spec.patch_size_px])
    assert np.array_equal(unpatchify(patches, grid, spec), np.asarray(original))


def test_pixels_come_back_from_their_normalised_values(spec):
    patches = np.random.default_rng(0).integers(0, 256, (7, spec.patch_values), dtype=np.uint8)
    values = normalise(torch.from_numpy(patches), spec)
    assert np.array_equal(denormalise(values, spec).numpy(), patches)
    assert set(denormalise(values * 1e6, spec).flatten().tolist()) <= {0, 255}


def test_a_perfect_painter_rebuilds_the_image_and_what_was_not_masked_is_the_original(spec, renderer):
    question = ask(batch_of(CONTENTS, renderer), spec)
    masked = masked_patches(question, spec)
    target = question.batch.stream.pixels[masked]
    for image_ in images_of(question, Answer(255 - target, target, None, None), spec, most=99):
        assert np.array_equal(image_.rebuilt, image_.original)
    shown = images_of(question, Answer(255 - target, 255 - target, None, None), spec, most=99)
    spots = [masked_pixels(question, number, spec) for number in range(len(question.batch.stream.grid_thw))]
    spots = [spot for spot in spots if spot.any()]
    assert len(shown) == len(spots) >= 5 and not spots[0].all()
    for image_, spot in zip(shown, spots, strict=True):
        assert np.array_equal(image_.rebuilt[~spot], image_.original[~spot])
        assert np.array_equal(image_.rebuilt[spot], 255 - image_.original[spot])
    chosen = images_of(question, Answer(target, target, None, None), spec, most=2)
    assert [i.original.shape for i in chosen] == [shown[0].original.shape, shown[-1].original.shape]


def test_the_original_is_what_the_vision_tower_reads(spec, renderer):
    question = ask(batch_of(CONTENTS[1:2], renderer), spec)
    target = question.batch.stream.pixels[masked_patches(question, spec)]
    (shown,) = images_of(question, Answer(target, target, None, None), spec, most=1)
    read = read_patches(CONTENTS[1][0].image, spec)
    assert np.array_equal(shown.original, unpatchify(read, question.batch.stream.grid_thw[0], spec))


@pytest.mark.parametrize("normalised", [False, True])
def test_an_answer_is_what_stands_behind_the_losses(folder, spec, renderer, normalised):
    """Patches and guesses give the losses back that the same pass computes."""
    module = objective(folder, spec, normalise_patches=normalised)
    question = ask(batch_of(CONTENTS, renderer), spec)
    places = np.flatnonzero(question.batch.labels >= 0)
    answer, caught = module(Question(question.batch, places)), {}
    module.mae_decoder.register_forward_hook(lambda _m, _i, painted: caught.update(painted=painted.detach()))
    terms = module(copy.deepcopy(question.batch))

    masked = masked_patches(question, spec)
    target = normalise(torch.from_numpy(question.batch.stream.pixels[masked]), spec)
    painted = caught["painted"].reshape(-1, spec.patch_values)
    if normalised:
        painted = painted * (target.var(dim=1, keepdim=True) + 1e-6).sqrt() + target.mean(dim=1, keepdim=True)
    assert np.array_equal(answer.rebuilt, denormalise(painted, spec).numpy())
    if not normalised:
        assert terms["mae"].sum.item() == pytest.approx((painted - target).square().mean(dim=1).sum().item(), rel=1e-5)

    assert answer.guesses.shape == answer.probabilities.shape == (len(places), GUESSES)
    assert (np.diff(answer.probabilities) <= 0).all() and (answer.probabilities.sum(axis=1) <= 1 + 1e-5).all()
    rows = [places[n] - 1 for n in range(len(places))]
    hidden = module.encoder(module._masked_stream(question.batch)[0])[rows]
    logits = (hidden @ module.lm_head.weight.T).softmax(dim=1).detach()
    assert np.array_equal(answer.guesses[:, 0], logits.argmax(dim=1).numpy())
    assert np.allclose(answer.probabilities[:, 0], logits.max(dim=1).values.numpy(), atol=1e-6)


def test_what_it_saw_is_the_noise_in_the_input(folder, spec, renderer):
    module = objective(folder, spec)
    batch = batch_of(CONTENTS[1:3], renderer)
    answer = module(ask(batch, spec))
    stream = to_device(batch.stream, spec, torch.device("cpu"))
    counts = [int(batch.masked_groups[:49].sum()) * 4, int(batch.masked_groups[49:].sum()) * 4]
    noise = unit_noise(batch.noise_seeds, np.array(counts), stream.pixel_values)
    assert np.array_equal(answer.seen, denormalise(first_frame(noise, spec), spec).numpy())
    assert repeat_in_time(first_frame(noise, spec), spec).shape == noise.shape


def test_a_passage_is_the_text_with_its_masked_words_guessed(spec, renderer, tokenizer):
    written = words(30, 1)
    batch = batch_of([(text(words(3)), image(84, 112, 2), text(written))], renderer)
    question = ask(batch, spec)
    ids = np.tile(batch.labels[question.words][:, None], GUESSES)  # every guess right
    passage = passage_of(question, Answer(None, None, ids, np.full(ids.shape, 0.25)), tokenizer, spec)
    assert len(passage) <= PASSAGE_TOKENS
    assert written.startswith("".join(word.text for word in passage).strip()), "the longest run, from its start"
    guessed = [word for word in passage if word.guesses]
    assert len(guessed) == len(question.words) > 3
    assert all(word.guesses == ((word.text, 0.25),) * GUESSES for word in guessed)


@pytest.mark.parametrize("off", ["mlm", "mae"])
def test_a_half_that_is_off_is_not_shown(folder, spec, renderer, tokenizer, off):
    module = objective(folder, spec, **{f"{off}_weight": 0})
    question = ask(batch_of(CONTENTS, renderer), spec)
    answer = module(question)
    assert bool(images_of(question, answer, spec, most=9)) == (off == "mlm")
    assert bool(passage_of(question, answer, tokenizer, spec)) == (off == "mae")


def test_nothing_can_be_asked_about_nothing(folder, spec, tokenizer):
    question = Question(blank(spec), np.empty(0, dtype=np.int64))
    answer = objective(folder, spec)(question)
    assert images_of(question, answer, spec, most=9) == [] and passage_of(question, answer, tokenizer, spec) == []
