"""InfoNCE against closed forms: what is compared with what, and what it costs."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from moca_core.loss.infonce import infonce, right_answers


def units(rows, seed=0):
    torch.manual_seed(seed)
    return normalize(torch.randn(rows, 16), dim=1)


def compare(queries, candidates, positive, allowed, temperature, **options):
    return infonce(queries, candidates, positive, ~allowed, torch.full((len(queries),), temperature), **options)


def everything(rows, columns):
    return torch.ones(rows, columns, dtype=torch.bool)


def test_infonce_is_the_written_out_sum():
    queries, candidates, positive = units(3), units(9, 1), torch.tensor([0, 3, 6])
    temperature, allowed = torch.tensor([0.2, 0.1, 0.5]), torch.rand(3, 9) > 0.3
    allowed[range(3), positive] = True
    losses = infonce(queries, candidates, positive, ~allowed, temperature).loss
    for b, row in enumerate(queries):
        scores = [math.exp((row @ c / temperature[b]).item()) for c in candidates]
        expected = -math.log(scores[positive[b]] / sum(s for c, s in enumerate(scores) if allowed[b, c]))
        assert losses[b].item() == pytest.approx(expected, rel=1e-5)


def test_equal_similarities_cost_the_log_of_the_number_allowed():
    queries, candidates = units(1).expand(4, -1), units(1).expand(12, -1)
    positive = torch.arange(4) * 3
    allowed = ~everything(4, 12)
    numbers = [1, 2, 7, 12]
    for b, number in enumerate(numbers):
        allowed[b] = torch.arange(12).roll(int(positive[b])) < number
    assert allowed.sum(1).tolist() == numbers and allowed[range(4), positive].all()
    found = compare(queries, candidates, positive, allowed, 0.03)
    assert found.loss.tolist() == pytest.approx([math.log(n) for n in numbers], rel=1e-5, abs=1e-5)
    assert found.won.tolist() == [True, False, False, False]  # ties are not won: only the query alone with its positive


def test_a_left_out_candidate_has_no_say_and_the_target_always_has():
    queries, candidates, positive = units(2), units(6, 1), torch.tensor([0, 3])
    allowed = everything(2, 6)
    allowed[:, 5] = False
    allowed[0, 0] = False  # its own answer
    results = []
    for filler in (0.0, 1.0):
        given = candidates.clone()
        given[5] = queries[0] * filler  # as near as can be
        given.requires_grad_()
        found = compare(queries, given, positive, allowed, 0.03)
        found.loss.sum().backward()
        results.append((found.loss.tolist(), found.won.tolist(), given.grad[5].abs().sum().item()))
        assert found.logits[:, 5].isneginf().all() and found.logits[:, :5].isfinite().all()
    assert results[0] == results[1] and results[0][2] == 0


def test_the_margin_leaves_out_what_beats_the_answer_by_more():
    """Similarities 0.5 to the answer, then above it by 0.05, 0.15 and 0.25."""
    angles = torch.tensor([0.5, 0.55, 0.65, 0.75, 0.1]).acos()
    candidates = torch.stack([angles.cos(), angles.sin()], dim=1)
    query, positive = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    for margin, left in ((None, 5), (0.3, 5), (0.2, 4), (0.1, 3), (0.0, 2)):
        found = compare(query, candidates, positive, everything(1, 5), 0.1, margin=margin)
        assert found.logits.isfinite().sum() == left, margin
        logits = (candidates[:, 0] / 0.1)[[0, 4, 1, 2, 3][:left]]
        assert found.loss.item() == pytest.approx((logits.logsumexp(0) - logits[0]).item(), rel=1e-5)
        assert not found.won.any()  # whatever the margin forgives


def test_won_are_strict_winners():
    candidates = torch.eye(4)
    queries = normalize(torch.tensor([[2.0, 1, 0, 0], [2, 1, 0, 0], [1, 0, 1, 0]]), dim=1)
    positive = torch.tensor([0, 1, 2])  # won, lost, tied with candidate 0
    assert compare(queries, candidates, positive, everything(3, 4), 0.03).won.tolist() == [True, False, False]
    assert not compare(queries, candidates * torch.nan, positive, everything(3, 4), 0.03).won.any()


def known_right(answers, queries, candidates, candidate_query):
    """For answers without a group: each is known by its content alone."""
    answers, candidates = (torch.as_tensor(x)[..., None].repeat_interleave(2, -1) for x in (answers, candidates))
    return right_answers(answers, queries, candidates, candidate_query)


def test_equal_answers_and_answers_to_an_equal_query_are_right():
    # the answers of queries 0 and 2 are the same, candidate 4 equals them too; queries 1 and 3 are the same question
    group = torch.tensor([10, 20, 11, 21, 10, 10, 12])
    candidate_query = torch.tensor([1, 0, 2, 0, 0, 3, 2])
    right = known_right([[10], [11], [10], [12]], torch.tensor([1, 2, 3, 2]), group, candidate_query)
    assert right.int().tolist() == [
        [1, 0, 0, 0, 1, 1, 0],
        [0, 0, 1, 0, 0, 0, 1],
        [1, 0, 0, 0, 1, 1, 0],
        [0, 0, 1, 0, 0, 0, 1],
    ]


def test_any_of_several_answers_is_right():
    queries, candidate_query = torch.tensor([1, 2]), torch.tensor([1, 1, 2, 0])
    right = known_right([[10, 11], [12, 12]], queries, [10, 11, 12, 13], candidate_query)
    assert right.int().tolist() == [[1, 1, 0, 0], [0, 0, 1, 0]]


def test_the_same_group_or_the_same_content_is_the_same_answer():
    """Candidates: the answer itself, another of its group, its content listed as wrong, what only looks like it by mixed-up columns."""
    answers, candidates = torch.tensor([[[70, 10]]]), torch.tensor([[70, 10], [70, 11], [10, 10], [10, 70]])
    right = right_answers(answers, torch.tensor([1]), candidates, torch.tensor([1, 2, 0, 0]))
    assert right.int().tolist() == [[1, 1, 1, 0]]


def test_gradients_are_those_of_finite_differences():
    generator = torch.Generator().manual_seed(1)
    rows, columns = (torch.randn(n, 4, generator=generator, dtype=torch.float64).requires_grad_() for n in (3, 6))
    temperature = torch.tensor([0.5, 0.7, 1.1], dtype=torch.float64, requires_grad=True)
    left_out = torch.rand(3, 6, generator=generator) > 0.7

    def loss(rows, columns, temperature):
        unit = normalize(rows, dim=1), normalize(columns, dim=1)
        return infonce(*unit, torch.tensor([0, 3, 3]), left_out, temperature, margin=0.4).loss

    assert left_out.any() and torch.autograd.gradcheck(loss, (rows, columns, temperature))
