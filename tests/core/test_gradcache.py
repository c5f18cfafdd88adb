"""GradCache gives the gradients of the plain step, with every option, in any number of parts, on any number of ranks."""

import pytest
import torch
from samples import image, text, words

from cluster import collectives
from moca_core.attention import set_attention
from moca_core.backbone import load_backbone
from moca_core.data.pairs import collate_pairs
from moca_core.data.render import Renderer, load_tokenizer
from moca_core.gradcache import cached_step
from moca_core.objective.contrastive import Contrastive, Encoded, Gather
from moca_core.objective.contrastive_config import ContrastiveConfig
from moca_core.spec import read_spec
from moca_core.types import Pair
from tests.ranks import on_ranks

SHARES = {1: [8], 2: [7, 1], 4: [3, 1, 2, 2]}
PAPER = {"temperature": 0.1}
EVERYTHING = {
    "temperature": 0.1,
    "temperatures": {"b": 0.2},
    "learn_temperature": True,
    "false_negative_margin": 0.05,
    "symmetric": True,
    "matryoshka_dims": (16, 8),
}
OPTIONS = {"paper": PAPER, "everything": EVERYTHING}
COUNTS = (1, 2, 5, 40)  # parts; no rank has 40 sequences


def side(seed, with_image=False):
    return (text(words(5 + seed % 4, seed)),) + ((image(56, 56 + 28 * (seed % 2), seed),) if with_image else ())


def made_up_pairs():
    """Of two tasks, with one to three right answers and none to two wrong ones; only some have images."""
    pairs = []
    for n in range(8):
        seed = 100 * n
        right = tuple(side(seed + k, n % 3 == 0) for k in range(1, 2 + n % 3))
        wrong = tuple(side(seed + 10 + k, n == 1) for k in range(n % 3))
        pairs.append(Pair("ab"[n % 2], side(seed, n % 4 == 0), right, wrong, group="same" if n > 5 else None))
    return pairs


def batch_of(folder, rank=0, world=1):
    first = sum(SHARES[world][:rank])
    renderer = Renderer(load_tokenizer(f"{folder}/tokenizer.json"), read_spec(folder), 256)
    return collate_pairs(
        made_up_pairs()[first : first + SHARES[world][rank]],
        renderer,
        num_negatives=2,
        num_positives=3,
        sources=["a", "b"],
        key=(0,),
    )


def prepared(folder):
    model = load_backbone(folder)
    set_attention(model, "bidirectional")
    return model


def loss_of(terms):
    return terms["contrastive"].sum / 8


def plain_step(module, batch):
    terms = module(batch)
    loss_of(terms).backward()
    return terms


class Recorder:
    """A backward that knows its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, loss, *, last):
        loss.backward()
        self.calls.append(last)


def cached(module, batch, count, forward=None):
    record = Recorder()
    terms = cached_step(module, batch, count, forward=forward or module, backward=record, loss_of=loss_of)
    assert record.calls == [False] * (count - 1) + [True]
    assert not any(term.sum.requires_grad for term in terms.values())
    return terms


def found(module, terms):
    """Sums and gradients over all ranks; clears the gradients."""
    sums = {name: collectives.all_reduce_sum(term.sum) for name, term in terms.items()}
    gradients = {}
    for name, parameter in module.named_parameters():
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients[name] = collectives.all_reduce_sum(own)
    module.zero_grad()
    return sums, gradients


def on_a_rank(folder):
    rank, world = collectives.rank(), collectives.world_size()
    gather = Gather(rank, collectives.all_gather_with_grad, collectives.all_gather)
    model, batch, results = prepared(folder), batch_of(folder, rank, world), {}
    for name, options in OPTIONS.items():
        module = Contrastive(model, read_spec(folder), ContrastiveConfig(**options), tasks=("a", "b"), gather=gather)
        for count in (None, *COUNTS):
            terms = plain_step(module, batch) if count is None else cached(module, batch, count)
            results[name, count] = found(module, terms)
    return results


@pytest.fixture(scope="module")
def alone(folder):
    """The plain step of one process, of every option."""
    results = {}
    for name, options in OPTIONS.items():
        module = Contrastive(prepared(folder), read_spec(folder), ContrastiveConfig(**options), tasks=("a", "b"))
        results[name] = found(module, plain_step(module, batch_of(folder)))
    return results


@pytest.fixture(scope="module", params=[1, 2, 4])
def ranks(request, folder):
    return on_ranks(on_a_rank, request.param, folder)


def furthest(gradients, others):
    """The largest difference, as a share of the largest gradient."""
    assert gradients.keys() == others.keys()
    scale = max(gradient.abs().max() for gradient in others.values())
    return (max((gradients[name] - other).abs().max() for name, other in others.items()) / scale).item()


@pytest.mark.parametrize("name", OPTIONS)
def test_any_number_of_parts_and_ranks_has_the_gradients_of_one_plain_step(ranks, alone, name):
    sums, gradients = alone[name]
    assert sum(gradient.any().item() for gradient in gradients.values()) > 30
    for count in (None, *COUNTS):
        terms, others = ranks[name, count]
        assert furthest(others, gradients) < 1e-6, count
        for term, value in sums.items():
            torch.testing.assert_close(terms[term], value, atol=1e-5, rtol=1e-5)


def right(forward):
    return forward


def rows_backwards(forward):
    """The second round gives each part's gradients to the wrong sequences."""
    return of_second_round(forward, lambda encoded, number: (encoded.embeddings.flip(0), encoded.log_temperature))


def a_part_forgotten(forward):
    return of_second_round(
        forward, lambda encoded, number: (encoded.embeddings * (number != 2), encoded.log_temperature)
    )


def temperature_twice(forward):
    return of_second_round(forward, lambda encoded, number: (encoded.embeddings, 2 * encoded.log_temperature))


def of_second_round(forward, then):
    calls = []

    def again(part):
        calls.append(part)
        encoded = forward(part)
        return encoded if len(calls) <= PARTS else Encoded(*then(encoded, len(calls) - PARTS))

    return again


PARTS = 5


@pytest.mark.parametrize(
    "mistake", [right, rows_backwards, a_part_forgotten, temperature_twice], ids=lambda mistake: mistake.__name__
)
def test_a_mistake_would_show(folder, alone, mistake):
    config = ContrastiveConfig(**EVERYTHING)
    module = Contrastive(prepared(folder), read_spec(folder), config, tasks=("a", "b"))
    _, gradients = found(module, cached(module, batch_of(folder), PARTS, mistake(module)))
    assert (furthest(gradients, alone["everything"][1]) > 1e-3) == (mistake is not right)
