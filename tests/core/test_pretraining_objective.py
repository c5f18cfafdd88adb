"""Continual pre-training: counts known beforehand, sums that add up, and a decoder that starts from the tower."""

import copy

import numpy as np
import pytest
import torch
from samples import CONTENTS, image, row_of, text, words

from moca_core.attention import set_attention
from moca_core.backbone import load_backbone
from moca_core.data.masking import mask, next_token
from moca_core.data.rows import packed_row, sequence_row
from moca_core.model.inputs import to_device
from moca_core.objective.pretraining import MaskedModelling


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
@pytest.mark.parametrize("mae_weight", [0.5, 0])
def test_counts_are_those_of_the_forward(folder, spec, renderer, contents, mae_weight):
    module = objective(folder, spec, mae_weight=mae_weight)
    batch = batch_of(contents, renderer)
    terms = module(batch)
    assert {n: t.count for n, t in terms.items()} == module.counts(batch)
    assert list(terms) == list(module.weights) == (["mlm", "mae"] if mae_weight else ["mlm"])
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
    """One batch of three pieces or two batches of the same: equal sums, equal gradients over the total count."""
    contents, names = [CONTENTS[3], CONTENTS[0], CONTENTS[2]], ["a", "b", "c"]
    results = []
    for split in ([[0, 1, 2]], [[2, 1], [0]], [[1], [2, 0]]):
        module = objective(folder, spec)
        batches = [batch_of([contents[i] for i in part], renderer, names=[names[i] for i in part]) for part in split]
        for batch in batches:
            batch.noise_seed = 0
            batch.masked_groups[:] = False  # noise belongs to a pack; the painted patches have a test of their own
        total = sum(module.counts(b)["mlm"] for b in batches)
        sums = 0
        for batch in batches:
            term = module(batch)["mlm"]
            (term.sum / total).backward()
            sums += term.sum.item()
        results.append((sums, total, gradients(module)))
    for sums, total, grads in results[1:]:
        assert total == results[0][1]
        assert sums == pytest.approx(results[0][0], rel=1e-5)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, results[0][2][name], atol=2e-6, rtol=1e-4)


def test_painted_losses_add_up_over_any_split(folder, spec, renderer, monkeypatch):
    """With the noise replaced by a constant, as it belongs to a pack and not to a patch."""
    from moca_core.objective import pretraining

    def constant(values, masked, seed, spec):
        return torch.where(masked.repeat_interleave(spec.group_size)[:, None], torch.full_like(values, 0.3), values)

    monkeypatch.setattr(pretraining, "add_noise", constant)
    results = []
    for split in ([["a", "b"]], [["b"], ["a"]]):
        module = objective(folder, spec)
        given = {"a": CONTENTS[3], "b": CONTENTS[2]}
        batches = [batch_of([given[n] for n in part], renderer, names=part) for part in split]
        total = sum(module.counts(b)["mae"] for b in batches)
        for batch in batches:
            (module(batch)["mae"].sum / total).backward()
        results.append((total, gradients(module)))
    assert results[0][0] == results[1][0] > 0
    assert any(n.startswith("encoder.backbone.visual") for n in results[0][1])
    for name, grad in results[0][1].items():
        torch.testing.assert_close(grad, results[1][1][name], atol=2e-6, rtol=1e-4)


def test_the_decoder_starts_as_the_middle_layer(folder, spec):
    module = objective(folder, spec)
    middle = module.encoder.backbone.language_model.layers[1]  # of three
    decoder = module.mae_decoder.layer
    for name, weight in middle.named_parameters():
        copied = decoder.get_parameter(name)
        assert torch.equal(copied, weight) and copied.data_ptr() != weight.data_ptr()
    assert module.mae_decoder.projection.out_features == 4 * 3 * 14 * 14


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


@torch.no_grad()
def test_the_decoder_is_the_layer_over_every_sequence_alone(folder, spec, renderer):
    """Bidirectional within a sequence, blind to its neighbours, even over a causal tower."""
    module = objective(folder, spec, causal=True)
    batch = batch_of(CONTENTS[2:4], renderer, mae_ratio=1.0)
    stream = to_device(batch.stream, spec, torch.device("cpu"))
    hidden = torch.randn(len(stream.input_ids), spec.text_hidden)
    rotary = module.encoder.backbone.language_model.rotary_emb
    masked = stream.input_ids == spec.image_token_id
    painted = module.mae_decoder(hidden, stream, masked, rotary)
    layer = copy.deepcopy(module.mae_decoder.layer)
    layer.self_attn.config = copy.deepcopy(layer.self_attn.config)
    layer.self_attn.config._attn_implementation = "eager"
    outputs = []
    for start, end in zip(stream.cu_seqlens[:-1], stream.cu_seqlens[1:], strict=True):
        states = hidden[None, start:end]
        positions = rotary(states, stream.position_ids[1:, None, start:end])
        outputs.append(layer(states, attention_mask=None, position_embeddings=positions))
    outputs = [o[0] if isinstance(o, tuple) else o for o in outputs]
    alone = torch.cat([o.reshape(-1, spec.text_hidden) for o in outputs])
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
    term = module(next_token(row, spec))["mlm"]
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder)
    expected = model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss
    torch.testing.assert_close(term.sum / term.count, expected, atol=1e-5, rtol=1e-5)


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
