"""Losses against their closed forms."""

import math

import pytest
import torch

from moca_core.loss import fused_cross_entropy
from moca_core.loss.fused_cross_entropy import linear_cross_entropy
from moca_core.loss.mae import mae_loss
from moca_core.loss.mlm import LanguageHead, mlm_loss


@pytest.fixture
def head():
    torch.manual_seed(0)
    return LanguageHead(torch.nn.Linear(8, 50, bias=False))


def masked_at(places, ids, states, head, shift=True):
    return mlm_loss(states, torch.tensor(places), torch.tensor(ids), head, shift=shift)


def test_uniform_logits_cost_log_v(head):
    torch.nn.init.zeros_(head.weight)
    loss = masked_at([1, 3, 4], [3, 49, 0], torch.randn(5, 8), head)
    assert loss.count == 3
    assert loss.sum.item() == pytest.approx(3 * math.log(50), rel=1e-6)


@pytest.mark.parametrize("shift", [True, False])
def test_mlm_is_minus_log_p_of_the_state_before(head, shift):
    states = torch.randn(6, 8, requires_grad=True)
    places, ids = [1, 4, 5], [7, 0, 11]
    loss = masked_at(places, ids, states, head, shift)
    reads = [p - 1 if shift else p for p in places]
    expected = sum(-(states[r] @ head.weight.T).log_softmax(0)[i] for r, i in zip(reads, ids, strict=True))
    torch.testing.assert_close(loss.sum, expected)
    loss.sum.backward()
    assert torch.nonzero(states.grad.abs().sum(1)).flatten().tolist() == reads  # only these rows reach the head


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 100, None])
def test_fused_cross_entropy_is_that_of_all_logits(head, monkeypatch, chunk_rows):
    """Loss and gradients against torch, however the rows are cut."""
    if chunk_rows is not None:
        monkeypatch.setattr(fused_cross_entropy, "CHUNK_LOGITS", 50 * chunk_rows)
    states, targets = torch.randn(7, 8, requires_grad=True), torch.randint(50, (7,))
    loss = linear_cross_entropy(states, head.weight, targets)
    mine = torch.autograd.grad(3 * loss, (states, head.weight))
    expected = torch.nn.functional.cross_entropy(states @ head.weight.T, targets, reduction="sum")
    torch.testing.assert_close(loss, expected)
    for grad, other in zip(mine, torch.autograd.grad(3 * expected, (states, head.weight)), strict=True):
        torch.testing.assert_close(grad, other, atol=1e-6, rtol=1e-5)


def test_fused_cross_entropy_of_large_logits_and_of_a_frozen_head(head, monkeypatch):
    monkeypatch.setattr(fused_cross_entropy, "CHUNK_LOGITS", 50 * 2)
    states, targets = 100 * torch.randn(7, 8, requires_grad=True), torch.randint(50, (7,))
    head.weight.requires_grad_(False)
    loss = linear_cross_entropy(states, head.weight, targets)
    expected = torch.nn.functional.cross_entropy(states @ head.weight.T, targets, reduction="sum")
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, states)[0] for x in (loss, expected)), atol=1e-6, rtol=1e-5)


def test_mlm_of_half_precision_is_summed_in_float32(head, monkeypatch):
    monkeypatch.setattr(fused_cross_entropy, "CHUNK_LOGITS", 50 * 64)
    states, targets = torch.randn(400, 8), torch.arange(400) % 50
    half = linear_cross_entropy(states.bfloat16(), head.weight.bfloat16(), targets)
    assert half.dtype == torch.float32
    logits = (states.bfloat16() @ head.weight.bfloat16().T).float()
    torch.testing.assert_close(half, torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))


def test_mlm_of_no_masked_token_is_zero_with_gradients(head):
    states = torch.randn(4, 8, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    loss = mlm_loss(states, none, none, head, shift=True)
    loss.sum.backward()
    assert (loss.sum.item(), loss.count) == (0, 0)
    assert torch.equal(states.grad, torch.zeros(4, 8)) and torch.equal(head.weight.grad, torch.zeros(50, 8))


@pytest.mark.parametrize("normalised", [False, True])
def test_perfect_painting_costs_nothing(normalised):
    target = torch.randn(5, 12)
    painted = target
    if normalised:
        painted = (target - target.mean(1, keepdim=True)) / target.std(1, keepdim=True)
    loss = mae_loss(painted, target, normalise_patches=normalised)
    assert loss.count == 5
    assert loss.sum.item() == pytest.approx(0, abs=1e-4)


def test_mae_is_the_mean_square_of_a_patch_summed_over_patches():
    target = torch.zeros(3, 4)
    painted = torch.tensor([[1.0, 1, 1, 1], [2, 0, 0, 0], [0, 0, 0, 0]])
    loss = mae_loss(painted, target)
    assert (loss.sum.item(), loss.count) == (2.0, 3)


def test_normalised_mae_forgets_brightness_and_contrast():
    target, painted = torch.randn(6, 12), torch.randn(6, 12)
    scaled = target * torch.rand(6, 1).add(1) + torch.randn(6, 1)
    one, other = (mae_loss(painted, t, normalise_patches=True).sum for t in (target, scaled))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    zeros = mae_loss(torch.zeros(6, 12), target, normalise_patches=True).sum
    assert zeros.item() == pytest.approx(6 * 11 / 12, rel=1e-4)  # the deviation is that of a sample
    flat = mae_loss(torch.zeros(1, 4), torch.full((1, 4), 0.7), normalise_patches=True)
    assert flat.sum.item() == 0  # a patch of one colour: no division by nothing


@pytest.mark.parametrize("normalised", [False, True])
def test_mae_of_no_patches_is_zero_with_gradients(normalised):
    painted = torch.zeros(0, 12, requires_grad=True)
    loss = mae_loss(painted, torch.zeros(0, 12), normalise_patches=normalised)
    loss.sum.backward()
    assert (loss.sum.item(), loss.count) == (0, 0) and painted.grad is not None
