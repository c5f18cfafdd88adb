"""Continual pre-training: counts known beforehand, sums that add up, and a decoder that starts from the tower."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from samples import CONTENTS, image, row_of, text, words

from moca_core.attention import set_attention
from moca_core.backbone import load_backbone
from moca_core.data.masking import mask, next_token
from moca_core.data.render import Renderer
from moca_core.data.rows import packed_row, sequence_row
from moca_core.model.inputs import to_device
from moca_core.model.mae_decoder import Canvas
from moca_core.objective.pretraining import MaskedModelling
from moca_core.spec import read_spec


def objective(folder, spec, seed=0, causal=False, **options):
    model = load_backbone(folder)
    if not causal:
        set_attention(model, "bidirectional")
    torch.manual_seed(seed)
    return MaskedModelling(model, spec, **options)


def batch_of(contents, renderer, mae_ratio=0.5, names=None):
    rows = [sequence_row(f"{n}", renderer.first(c)) for n, c in zip(names or range(9), contents, strict=False)]
    return mask(packed_row(rows, renderer.spec), renderer.spec, seed=3, epoch=0, mlm_ratio=0.4, mae_ratio=mae_ratio)


def gradients(module):
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


TEXT = ((text(words(20)),), (text(words(9, 1)),))


@pytest.mark.parametrize("contents", [CONTENTS, TEXT, CONTENTS[1:2]], ids=["mixed", "text", "image"])
@pytest.mark.parametrize(("mlm_weight", "mae_weight"), [(1, 0.5), (1, 0), (0, 0.5)])
def test_counts_are_those_of_the_forward(folder, spec, renderer, contents, mlm_weight, mae_weight):
    module = objective(folder, spec, mlm_weight=mlm_weight, mae_weight=mae_weight)
    batch = batch_of(contents, renderer)
    terms = module(batch)
    assert {n: t.count for n, t in terms.items()} == module.counts(batch)
    assert list(terms) == list(module.weights) == ["mlm"] * bool(mlm_weight) + ["mae"] * bool(mae_weight)
    if mlm_weight:
        assert module.counts(batch)["mlm"] == (batch.labels != -100).sum()
    if mae_weight:
        assert terms["mae"].count == 4 * batch.masked_groups.sum()


@pytest.mark.parametrize("contents", [TEXT, CONTENTS[1:2], CONTENTS], ids=["text", "image", "mixed"])
def test_every_parameter_of_both_towers_gets_a_finite_gradient(folder, spec, renderer, contents):
    module = objective(folder, spec)
    terms = module(batch_of(contents, renderer, mae_ratio=0.5))
    (terms["mlm"].sum + 0.5 * terms["mae"].sum).backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    vision = sum(p.grad.abs().sum() for p in module.encoder.backbone.visual.parameters())
    assert (vision == 0) == (contents is TEXT)


def test_losses_and_gradients_add_up_over_any_split(folder, spec, renderer):
    """One batch of three pieces or batches of some of them, in any order: equal sums, equal gradients over the total counts.

    Masks and noise are of the piece, not of the pack."""
    given = {"a": CONTENTS[3], "b": CONTENTS[0], "c": CONTENTS[2]}
    results = []
    for split in (["abc"], ["cb", "a"], ["b", "ca"]):
        module = objective(folder, spec)
        batches = [batch_of([given[name] for name in part], renderer, names=part) for part in split]
        totals = {n: sum(module.counts(b)[n] for b in batches) for n in module.weights}
        sums = dict.fromkeys(totals, 0.0)
        for batch in batches:
            terms = module(batch)
            sum(module.weights[n] * terms[n].sum / totals[n] for n in totals).backward()
            sums = {n: sums[n] + terms[n].sum.item() for n in sums}
        results.append((totals, sums, gradients(module)))
    assert all(results[0][0].values())
    for totals, sums, grads in results[1:]:
        assert totals == results[0][0]
        assert sums == pytest.approx(results[0][1], rel=1e-5)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, results[0][2][name], atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_decoder_starts_as_the_middle_layers(folder, spec, depth):
    module = objective(folder, spec, decoder_layers=depth)
    layers = module.encoder.backbone.language_model.layers  # three
    assert len(module.mae_decoder.layers) == depth
    for number, decoder in enumerate(module.mae_decoder.layers, 1):
        for name, weight in layers[number].named_parameters():
            copied = decoder.get_parameter(name)
            assert torch.equal(copied, weight) and copied.data_ptr() != weight.data_ptr()
    assert module.mae_decoder.projection.out_features == 4 * 3 * 14 * 14


def test_a_decoder_deeper_than_the_upper_half_is_refused(folder, spec):
    with pytest.raises(ValueError, match="3 layers from the middle of 3: 1 to 2"):
        objective(folder, spec, decoder_layers=3)


def test_a_frozen_tower_gives_a_decoder_that_trains(folder, spec, renderer):
    model = load_backbone(folder)
    model.requires_grad_(False)
    module = MaskedModelling(model, spec)
    module(batch_of(CONTENTS, renderer))["mae"].sum.backward()
    assert {n.split(".")[0] for n in gradients(module)} == {"mae_decoder"}


@torch.no_grad()
def test_only_masked_tokens_are_projected_and_seen_by_the_mae_loss(folder, spec, renderer):
    module = objective(folder, spec)
    seen = []
    module.mae_decoder.projection.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    batch = batch_of(CONTENTS, renderer)
    term = module(batch)["mae"]
    (states, painted) = seen[0]
    assert len(states) == batch.masked_groups.sum() > 0
    # the target: the processor's values of the first frame of exactly these patches
    values = to_device(batch.stream, spec, torch.device("cpu")).pixel_values
    first = values.view(-1, 3, 2, 14 * 14)[:, :, 0].flatten(1)[np.repeat(batch.masked_groups, 4)]
    expected = (painted.view(-1, 3 * 14 * 14) - first).square().mean(1).sum()
    torch.testing.assert_close(term.sum, expected)


@pytest.mark.parametrize("depth", [1, 2])
@torch.no_grad()
def test_the_decoder_is_its_layers_over_every_sequence_alone(any_folder, tokenizer, depth):
    """Bidirectional within a sequence, blind to its neighbours, even over a causal tower; every position computed by transformers."""
    spec = read_spec(any_folder)
    module = objective(any_folder, spec, causal=True, decoder_layers=depth)
    batch = batch_of((CONTENTS[2], CONTENTS[0], CONTENTS[3]), Renderer(tokenizer, spec, 256))
    stream = to_device(batch.stream, spec, torch.device("cpu"))
    hidden = torch.randn(len(stream.input_ids), spec.text_hidden)
    rotary = module.encoder.backbone.language_model.rotary_emb
    masked = stream.image_positions[torch.from_numpy(batch.masked_groups)]
    canvas = Canvas.of(batch.stream.cu_seqlens, masked.numpy())
    assert len(canvas.context_lengths) == 2 and len(canvas.context) < len(hidden)  # the text is not looked at
    painted = module.mae_decoder(hidden, stream.position_ids, canvas, rotary)
    layers = copy.deepcopy(module.mae_decoder.layers)
    for layer in layers:
        layer.self_attn.config = copy.deepcopy(layer.self_attn.config)
        layer.self_attn.config._attn_implementation = "eager"
    outputs = []
    for start, end in pairwise(stream.cu_seqlens.tolist()):
        states = hidden[None, start:end]
        positions = rotary(states, stream.position_ids[1:, None, start:end])
        for layer in layers:
            states = layer(states, attention_mask=None, position_embeddings=positions)
        outputs.append(states[0])
    alone = torch.cat(outputs)
    torch.testing.assert_close(painted, module.mae_decoder.projection(alone[masked]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_masked_pixels_reach_the_loss_only_as_targets(folder, spec, renderer):
    """What hides behind the noise cannot be read: other pixels there move no hidden state, pixels elsewhere do."""
    module = objective(folder, spec)
    batch = batch_of([CONTENTS[3]], renderer)
    rows = np.repeat(batch.masked_groups, 4)
    sums = []
    for chosen in (None, rows, ~rows):
        other = copy.deepcopy(batch)
        if chosen is not None:
            other.stream.pixels[chosen] = 255 - other.stream.pixels[chosen]
        terms = module(other)
        sums.append((terms["mlm"].sum.item(), terms["mae"].sum.item()))
    assert sums[1][0] == sums[0][0] and sums[1][1] != sums[0][1]
    assert sums[2][0] != sums[0][0]


@torch.no_grad()
def test_next_token_on_a_causal_model_is_the_loss_of_transformers(folder, spec, renderer):
    module = objective(folder, spec, causal=True, mae_weight=0)
    ids = renderer.first((text(words(25)),)).input_ids
    row = row_of(((text(words(25)),),), renderer)
    term = module(next_token(row, spec, seed=0, epoch=0))["mlm"]
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder)
    expected = model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss
    torch.testing.assert_close(term.sum / term.count, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mae_weight", [0, 0.5])
def test_seeds_of_noise_change_nothing_where_nothing_is_masked(folder, spec, renderer, mae_weight):
    module, row, found = objective(folder, spec, mae_weight=mae_weight), row_of(CONTENTS, renderer), []
    for seeds in (None, np.zeros(len(CONTENTS), dtype=np.int64)):
        batch = next_token(row, spec, seed=3, epoch=1)
        assert batch.noise_seeds.all()
        batch.noise_seeds = batch.noise_seeds if seeds is None else seeds
        module.zero_grad()
        sums = {name: term.sum for name, term in module(batch).items()}
        sum(sums.values()).backward()
        found.append(sums | gradients(module))
    assert found[0].keys() == found[1].keys() and len(found[0]) > 30
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def test_training_learns_to_paint_and_to_fill_in(folder, spec, renderer):
    module = objective(folder, spec)
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    batch = batch_of([(text(words(12)), image(60, 60), text(words(12, 1)))], renderer)
    seen = []
    for _ in range(20):
        terms = module(batch)
        means = {n: t.sum / t.count for n, t in terms.items()}
        sum(module.weights[n] * m for n, m in means.items()).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append({n: m.item() for n, m in means.items()})
    assert all(seen[-1][n] < 0.7 * seen[0][n] for n in seen[0]), (seen[0], seen[-1])
