"""Contrastive fine-tuning: the written-out loss over all candidates, and two ranks that agree with one process."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist
from samples import image, text, words

from cluster import collectives
from moca_core.attention import set_attention
from moca_core.backbone import load_backbone
from moca_core.data.pairs import collate_pairs
from moca_core.data.render import Renderer, load_tokenizer
from moca_core.model.inputs import to_device
from moca_core.objective.contrastive import Contrastive, Gather
from moca_core.objective.contrastive_config import ContrastiveConfig
from moca_core.spec import read_spec
from moca_core.types import Pair
from tests.ranks import on_ranks


def side(seed, with_image=False):
    return (text(words(6, seed)),) + ((image(60, 60, seed),) if with_image else ())


PAIRS = [
    Pair("t", side(1, True), (side(2),), (side(3), side(4, True))),
    Pair("t", side(5), (side(6, True),), ()),  # no negatives
    Pair("t", side(7), (side(2),), (side(8),)),  # the answer of the first
    Pair("t", side(9), (side(10),), (side(2), side(11))),  # a negative that is the answer of the first
]


def renderer_of(folder):
    return Renderer(load_tokenizer(f"{folder}/tokenizer.json"), read_spec(folder), 256)


def objective(folder, gather=None, **options):
    model = load_backbone(folder)
    set_attention(model, "bidirectional")
    return Contrastive(model, read_spec(folder), ContrastiveConfig(**options), gather=gather or Gather())


def batch_of(pairs, renderer, num_negatives=2):
    return collate_pairs(pairs, renderer, num_negatives=num_negatives, sources=["t"], key=(0,))


def test_counts_are_those_of_the_forward(folder, renderer):
    module, batch = objective(folder), batch_of(PAIRS, renderer)
    terms = module(batch)
    counted = {n: t.count for n, t in terms.items() if n in module.weights}
    assert module.counts(batch) == counted == {"contrastive": 4, "accuracy": 4}
    assert module.weights == {"contrastive": 1.0, "accuracy": 0.0}
    assert 0 <= terms["accuracy"].sum.item() <= 4


@torch.no_grad()
def test_the_loss_is_infonce_over_every_allowed_candidate(folder, renderer):
    """Embeddings one by one; equal answers are wrong for nobody who asks for them."""
    module = objective(folder, temperature=0.1)

    def embed(content):
        batch = batch_of([Pair("t", content, (content,))], renderer, 0)
        return module.encoder.embed(to_device(batch.stream, module.spec, torch.device("cpu")))[0]

    total, won = 0.0, 0
    candidates = [c for p in PAIRS for c in (p.positives[0], *p.negatives)]
    for pair in PAIRS:
        query, own = embed(pair.query), pair.positives[0]
        right = math.exp(query @ embed(own) / 0.1)
        wrong = [math.exp(query @ embed(c) / 0.1) for c in candidates if c != own]
        total -= math.log(right / (right + sum(wrong)))
        won += right > max(wrong)
    terms = module(batch_of(PAIRS, renderer))
    assert terms["contrastive"].sum.item() == pytest.approx(total, rel=1e-4)
    assert terms["accuracy"].sum.item() == won


@torch.no_grad()
def test_embeddings_are_the_mean_over_all_tokens_and_unit_length(folder, renderer):
    module = objective(folder)
    stream = to_device(batch_of(PAIRS, renderer).stream, module.spec, torch.device("cpu"))
    states, vectors = module.encoder(stream), module.encoder.embed(stream)
    for vector, (start, end) in zip(vectors, pairwise(stream.cu_seqlens.tolist()), strict=True):
        mean = states[start:end].mean(0)
        torch.testing.assert_close(vector, mean / mean.norm())


def test_collating_lays_queries_first_then_what_there_is_for_each(renderer):
    batch = batch_of(PAIRS, renderer)
    assert batch.num_queries == 4
    assert batch.candidate_owner.tolist() == [0, 0, 0, 1, 2, 2, 3, 3, 3]
    assert np.flatnonzero(batch.candidate_positive).tolist() == [0, 3, 4, 6]
    present = [p.query for p in PAIRS] + [c for p in PAIRS for c in (p.positives[0], *p.negatives)]
    bounds = pairwise(batch.stream.cu_seqlens)
    got = [batch.stream.input_ids[s:e].tolist() for s, e in bounds]
    expected = [renderer.first(c).input_ids for c in present]
    assert got[:4] == expected[:4]
    # negatives in any order behind their positive
    assert sorted(got[4:]) == sorted(expected[4:]) and got[4] == renderer.first(PAIRS[0].positives[0]).input_ids
    group, answered = batch.candidate_group, batch.candidate_query
    assert group[0] == group[4] and group[0] in group[7:] and group[0] != group[6]
    assert len(set(answered[[0, 3, 4, 6]])) == 4 and not answered[[1, 2, 5, 7, 8]].any()


def test_sources_are_places_among_the_sorted_names(renderer):
    pairs = [Pair(task, side(n), (side(n + 1),)) for n, task in enumerate("bab")]
    batch = collate_pairs(pairs, renderer, num_negatives=0, sources=["a", "b", "c"], key=(0,))
    assert batch.source.tolist() == [1, 0, 1]


def test_named_groups_join_different_answers(renderer):
    pairs = [Pair("t", side(1), (side(2),), group="seven"), Pair("t", side(3), (side(4),), group="seven")]
    first, second = batch_of(pairs, renderer, 0).candidate_group
    assert first == second


@torch.no_grad()
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_grouped_answer_is_no_negative_where_another_pair_lists_it_as_wrong(folder, renderer, symmetric):
    """Groups that nobody shares change nothing: the content alone says that it is the same answer."""
    listed = [
        Pair("t", side(1), (side(2),), group="seven"),
        Pair("t", side(3), (side(4),), (side(2), side(5)), group="three"),
        Pair("t", side(6), (side(2, True),), (side(4),), group="eight"),
    ]
    module = objective(folder, symmetric=symmetric)
    grouped, ungrouped = (module(batch_of(p, renderer)) for p in (listed, [replace(p, group=None) for p in listed]))
    for term in grouped:
        torch.testing.assert_close(grouped[term].sum, ungrouped[term].sum)


def test_members_of_a_group_are_told_apart_by_what_a_batch_consumed(renderer):
    drawn = [batch_of([Pair("t", side(1), (side(n),), group="seven")], renderer) for n in (2, 3)]
    assert drawn[0].content != drawn[1].content


def test_spare_negatives_and_positives_are_drawn_by_the_key(renderer):
    pair = Pair("t", side(1), tuple(side(n) for n in range(20, 25)), tuple(side(n) for n in range(30, 40)))

    def of(key, positives=1):
        return collate_pairs([pair], renderer, num_negatives=3, num_positives=positives, sources=["t"], key=key)

    batches = [of((0, n)) for n in range(30)]
    again = of((0, 0))
    np.testing.assert_array_equal(again.candidate_group, batches[0].candidate_group)
    drawn = np.array([b.candidate_group for b in batches])
    assert len(set(drawn[:, 0])) == 5 and len(set(drawn[:, 1:].flatten())) == 10
    assert all(len(set(row)) == 4 for row in drawn)  # never the same twice
    several = of((0, 0), positives=2)
    assert several.candidate_positive.tolist() == [True] * 2 + [False] * 3 and len(set(several.candidate_group)) == 5
    assert len(set(several.candidate_query[:2])) == 1
    assert of((0, 0), positives=9).candidate_positive.sum() == 5  # as many as there are


def test_sides_are_read_up_to_the_budget(folder, renderer):
    long = (text("\n\n".join(words(60, n) for n in range(20))),)
    batch = batch_of([Pair("t", long, (long,))], renderer, 0)
    lengths = np.diff(batch.stream.cu_seqlens)
    assert max(lengths) <= 256 and batch.stream.input_ids[: lengths[0]].tolist() == renderer.first(long).input_ids


def shares(folder):
    return {negatives: share(dist.get_rank(), folder, negatives) for negatives in (2, 0)}


def share(rank, folder, negatives):
    """(loss and accuracy, gradients) summed over the ranks, three queries on the first and one on the second."""
    gather = Gather(rank, collectives.all_gather_with_grad, collectives.all_gather)
    module = objective(folder, gather=gather)
    batch = batch_of(PAIRS[3 * rank : 3 * rank + 3], renderer_of(folder), negatives)
    terms = module(batch)
    (terms["contrastive"].sum / 4).backward()
    sums = torch.stack([terms[n].sum.detach() for n in ("contrastive", "accuracy")])
    dist.all_reduce(sums)
    grads = {}
    for name, parameter in module.named_parameters():
        grads[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(grads[name])
    return sums, grads


@pytest.fixture(scope="module")
def two_ranks(folder):
    return on_ranks(shares, 2, folder)


@pytest.mark.parametrize("negatives", [2, 0])
def test_two_ranks_have_the_gradients_of_one_process(folder, renderer, two_ranks, negatives):
    sums, grads = two_ranks[negatives]
    module = objective(folder)
    terms = module(batch_of(PAIRS, renderer, negatives))
    (terms["contrastive"].sum / 4).backward()
    expected = torch.stack([terms[n].sum.detach() for n in ("contrastive", "accuracy")])
    torch.testing.assert_close(sums, expected, atol=1e-5, rtol=1e-5)
    largest = max(g.abs().max() for g in grads.values())
    assert largest > 1e-3
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(grads[name], parameter.grad, atol=1e-5 * largest.item(), rtol=1e-4)
