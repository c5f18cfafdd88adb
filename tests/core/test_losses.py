"""Losses against their closed forms."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from moca_core.loss.fused_cross_entropy import linear_cross_entropy
from moca_core.loss.infonce import allowed_candidates, infonce_loss
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
def test_fused_cross_entropy_is_that_of_all_logits(head, chunk_rows):
    """Loss and gradients against torch, however the rows are cut."""
    states, targets = torch.randn(7, 8, requires_grad=True), torch.randint(50, (7,))
    loss = linear_cross_entropy(states, head.weight, targets, chunk_rows=chunk_rows)
    mine = torch.autograd.grad(3 * loss, (states, head.weight))
    expected = torch.nn.functional.cross_entropy(states @ head.weight.T, targets, reduction="sum")
    torch.testing.assert_close(loss, expected)
    for grad, other in zip(mine, torch.autograd.grad(3 * expected, (states, head.weight)), strict=True):
        torch.testing.assert_close(grad, other, atol=1e-6, rtol=1e-5)


def test_fused_cross_entropy_of_large_logits_and_of_a_frozen_head(head):
    states, targets = 100 * torch.randn(7, 8, requires_grad=True), torch.randint(50, (7,))
    head.weight.requires_grad_(False)
    loss = linear_cross_entropy(states, head.weight, targets, chunk_rows=2)
    expected = torch.nn.functional.cross_entropy(states @ head.weight.T, targets, reduction="sum")
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, states)[0] for x in (loss, expected)), atol=1e-6, rtol=1e-5)


def test_mlm_of_half_precision_is_summed_in_float32(head):
    states, targets = torch.randn(400, 8), torch.arange(400) % 50
    half = linear_cross_entropy(states.bfloat16(), head.weight.bfloat16(), targets, chunk_rows=64)
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


def units(rows, seed=0):
    torch.manual_seed(seed)
    return normalize(torch.randn(rows, 16), dim=1)


def written_out(queries, candidates, positive, allowed, temperature):
    total = 0.0
    for b, row in enumerate(queries):
        scores = [(row @ c / temperature).item() for c in candidates]
        below = [math.exp(s) for c, s in enumerate(scores) if allowed[b, c]]
        total -= math.log(math.exp(scores[positive[b]]) / sum(below))
    return total


def test_infonce_is_the_written_out_sum():
    queries, candidates, positive = units(3), units(9, 1), torch.tensor([0, 3, 6])
    allowed = torch.rand(3, 9) > 0.3
    allowed[range(3), positive] = True
    loss, _ = infonce_loss(queries, candidates, positive, allowed, temperature=0.2)
    assert loss.count == 3
    assert loss.sum.item() == pytest.approx(written_out(queries, candidates, positive, allowed, 0.2), rel=1e-5)


def test_equal_similarities_cost_the_log_of_the_number_allowed():
    queries, candidates = units(1).expand(4, -1), units(1).expand(12, -1)
    positive = torch.arange(4) * 3
    allowed = torch.zeros(4, 12, dtype=torch.bool)
    numbers = [1, 2, 7, 12]
    for b, number in enumerate(numbers):
        allowed[b] = torch.arange(12).roll(int(positive[b])) < number
    assert allowed.sum(1).tolist() == numbers and allowed[range(4), positive].all()
    loss, accuracy = infonce_loss(queries, candidates, positive, allowed, temperature=0.03)
    assert loss.sum.item() == pytest.approx(sum(map(math.log, numbers)), rel=1e-5)
    assert (accuracy.sum.item(), accuracy.count) == (1, 4)  # ties are not won: only the query alone with its positive


def test_duplicates_and_missing_negatives_are_masked_and_foreign_negatives_count():
    # queries 0..2 with two negatives each; the answers of 0 and 2 are the same; negative 4 equals the answer of 0
    group = torch.tensor([10, 11, 12, 20, 10, 22, 10, 0, 0])
    valid = torch.tensor([True] * 7 + [False, False])
    query = torch.tensor([1, 0, 0, 2, 0, 0, 3, 0, 0])
    allowed = allowed_candidates(torch.tensor([0, 3, 6]), group, query, valid)
    expected = [
        [1, 1, 1, 1, 0, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0, 1, 1, 0, 0],
    ]
    assert allowed.int().tolist() == expected


def test_a_masked_candidate_has_no_say():
    queries, candidates, positive = units(2), units(6, 1), torch.tensor([0, 3])
    allowed = torch.ones(2, 6, dtype=torch.bool)
    allowed[:, 5] = False
    results = []
    for filler in (0.0, 1.0):
        given = candidates.clone()
        given[5] = queries[0] * filler  # as near as can be
        given.requires_grad_()
        loss, accuracy = infonce_loss(queries, given, positive, allowed, temperature=0.03)
        loss.sum.backward()
        results.append((loss.sum.item(), accuracy.sum.item(), given.grad[5].abs().sum().item()))
    assert results[0] == results[1] and results[0][2] == 0


def test_accuracy_counts_strict_winners():
    candidates = torch.eye(4)
    queries = normalize(torch.tensor([[2.0, 1, 0, 0], [2, 1, 0, 0], [1, 0, 1, 0]]), dim=1)
    positive = torch.tensor([0, 1, 2])  # won, lost, tied with candidate 0
    allowed = torch.ones(3, 4, dtype=torch.bool)
    _, accuracy = infonce_loss(queries, candidates, positive, allowed, temperature=0.03)
    assert accuracy.sum.item() == 1
    _, accuracy = infonce_loss(queries, candidates * torch.nan, positive, allowed, temperature=0.03)
    assert accuracy.sum.item() == 0


def test_two_right_answers_to_one_question_are_not_each_others_negatives():
    group = torch.tensor([10, 20, 11, 21])  # two queries with one negative each, the answers differ
    valid = torch.ones(4, dtype=torch.bool)
    same, other = torch.tensor([7, 0, 7, 0]), torch.tensor([7, 0, 8, 0])
    positive = torch.tensor([0, 2])
    assert allowed_candidates(positive, group, same, valid).tolist() == [
        [True, True, False, True],
        [False, True, True, True],
    ]
    assert allowed_candidates(positive, group, other, valid).all()
