"""Every option of the contrastive loss against the loss written out over pairs of vectors, on one rank and on several."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from cluster import collectives
from moca_core.backbone import load_backbone
from moca_core.loss import infonce as infonce_file
from moca_core.objective import comparison, contrastive
from moca_core.objective.contrastive import Contrastive, Encoded, Gather
from moca_core.objective.contrastive_config import ContrastiveConfig
from moca_core.spec import read_spec
from tests.core.made_up_pairs import TASKS, scene
from tests.ranks import on_ranks
from tests.stock import contrastive_written_out

WIDTH = 32  # of the tiny model
OPTIONS = {
    "paper": {"temperature": 0.1},
    "temperatures": {"temperature": 0.1, "temperatures": {"b": 0.05, "c": 0.3}},
    "learned": {"temperature": 0.1, "temperatures": {"c": 0.3}, "learn_temperature": True},
    "margin": {"temperature": 0.1, "false_negative_margin": 0.02},
    "symmetric": {"temperature": 0.1, "symmetric": True},
    "matryoshka": {"temperature": 0.1, "matryoshka_dims": (16, 3)},
    "all": {
        "temperature": 0.1,
        "temperatures": {"b": 0.05},
        "learn_temperature": True,
        "false_negative_margin": 0.02,
        "symmetric": True,
        "matryoshka_dims": (16,),
    },
}


def objective(model, folder, options, gather=None):
    return Contrastive(model, read_spec(folder), ContrastiveConfig(**options), tasks=TASKS, gather=gather)


def scored(module, whole, rank=0, world=1):
    """(loss, its gradients: of this rank's vectors and of the temperatures)."""
    vectors = whole.vectors_of(rank, world).clone().requires_grad_()
    learned = None if module.temperature is None else module.temperature()
    terms = module.score(Encoded(normalize(vectors, dim=1), learned), whole.batch(rank, world))
    (terms["contrastive"].sum / whole.num_queries).backward()
    temperatures = torch.zeros(len(TASKS)) if learned is None else module.temperature.log.grad
    return terms["contrastive"].sum.detach(), vectors.grad, temperatures


def on_a_rank(folder):
    """For every option what all ranks have together, vectors in the order of the whole batch."""
    model, whole = load_backbone(folder), scene(WIDTH)
    rank, world = collectives.rank(), collectives.world_size()
    gather = Gather(rank, collectives.all_gather_with_grad, collectives.all_gather)
    found = {}
    for name, options in OPTIONS.items():
        loss, vectors, temperatures = scored(objective(model, folder, options, gather), whole, rank, world)
        queries, candidates = whole.members(rank, world)
        everybody = torch.zeros_like(whole.vectors)
        everybody[np.concatenate([queries, whole.num_queries + candidates])] = vectors
        found[name] = [collectives.all_reduce_sum(x) for x in (loss, everybody, temperatures)]
    return found


def expected(options, whole):
    given = [options.get("temperatures", {}).get(task, options["temperature"]) for task in TASKS]
    log, vectors = torch.tensor(given).log().requires_grad_(), whole.vectors.clone().requires_grad_()
    loss = contrastive_written_out(
        *whole.told(vectors, log),
        margin=options.get("false_negative_margin"),
        symmetric=options.get("symmetric", False),
        widths=options.get("matryoshka_dims", ()),
    )
    (loss / whole.num_queries).backward()
    return loss.detach(), vectors.grad, log.grad if options.get("learn_temperature") else torch.zeros(len(TASKS))


@pytest.fixture(scope="module")
def written_out():
    return {name: expected(options, scene(WIDTH)) for name, options in OPTIONS.items()}


@pytest.fixture(scope="module", params=[1, 2, 4])
def ranks(request, folder):
    return on_ranks(on_a_rank, request.param, folder)


@pytest.mark.parametrize("name", OPTIONS)
def test_uneven_ranks_have_the_loss_and_gradients_of_all_pairs_written_out(ranks, written_out, name):
    for found, wanted in zip(ranks[name], written_out[name], strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_every_option_changes_the_loss(written_out):
    losses = [loss.item() for loss, _, _ in written_out.values()]
    apart = np.abs(np.subtract.outer(losses, losses)) + np.eye(len(losses))
    assert apart.min() > 1e-2, losses
    assert written_out["learned"][2].abs().min() > 1e-3


def same_answers_forgotten(patch):
    patch.setattr(comparison, "right_answers", lambda answers, query, offered, asked: query[:, None] == asked[None])


def equal_contents_forgotten(patch):
    known_by(patch, [0])


def groups_forgotten(patch):
    known_by(patch, [1])


def known_by(patch, names):
    right = infonce_file.right_answers
    patch.setattr(
        comparison,
        "right_answers",
        lambda answers, query, offered, answered: right(answers[..., names], query, offered[:, names], answered),
    )


def equal_queries_forgotten(patch):
    right = infonce_file.right_answers
    patch.setattr(comparison, "right_answers", lambda answers, query, *rest: right(answers, query + 5000, *rest))


def one_answer_of_several(patch):
    right = infonce_file.right_answers
    patch.setattr(comparison, "right_answers", lambda answers, *rest: right(answers[:, :1], *rest))


def rows_not_weighed(patch):
    def once_each(*given):
        rows = comparison.answer_rows(*given)
        return rows._replace(weight=torch.ones_like(rows.weight))

    patch.setattr(contrastive, "answer_rows", once_each)


def prefixes_not_normalised(patch):
    patch.setattr(contrastive, "normalize", lambda x, dim: x)


def the_first_task_for_all(patch):
    patch.setattr(contrastive, "of_queries", lambda given, learned, source: learned.exp()[0 * source])


def half_the_margin(patch):
    compare = infonce_file.infonce
    patch.setattr(contrastive, "infonce", lambda *given, margin: compare(*given, margin=margin / 2))


def one_direction(patch):
    views = contrastive.views
    patch.setattr(contrastive, "views", lambda *given, both: views(*given, both=False))


MISTAKES = (
    same_answers_forgotten,
    equal_contents_forgotten,
    groups_forgotten,
    equal_queries_forgotten,
    one_answer_of_several,
    rows_not_weighed,
    prefixes_not_normalised,
    the_first_task_for_all,
    half_the_margin,
    one_direction,
)


@pytest.mark.parametrize("mistake", [None, *MISTAKES], ids=lambda mistake: getattr(mistake, "__name__", "none"))
def test_a_mistake_would_show(folder, written_out, monkeypatch, mistake):
    module = objective(load_backbone(folder), folder, OPTIONS["all"])
    if mistake is not None:
        mistake(monkeypatch)
    found = scored(module, scene(WIDTH))[0].item()
    assert (abs(found - written_out["all"][0].item()) > 1e-3) == (mistake is not None)


def test_a_temperature_that_left_its_bounds_counts_as_the_bound_and_can_come_back(folder):
    module = objective(load_backbone(folder), folder, OPTIONS["learned"])
    with torch.no_grad():
        module.temperature.log.fill_(-9.0)
    loss, _, gradient = scored(module, scene(WIDTH))
    fixed = objective(load_backbone(folder), folder, {"temperature": 0.01})
    torch.testing.assert_close(loss, scored(fixed, scene(WIDTH))[0])
    assert gradient.abs().min() > 0


def test_nothing_idle_is_trained(folder):
    names = [name for name, _ in objective(load_backbone(folder), folder, OPTIONS["symmetric"]).named_parameters()]
    assert names and all(name.startswith("encoder.") for name in names)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": 0.0}, "temperature of 'temperature' is 0.0"),
        ({"temperatures": {"a": -1.0}}, "'a' is -1.0"),
        ({"temperature": 0.001, "learn_temperature": True}, "between 0.01 and 1.0"),
        ({"false_negative_margin": -0.1}, "at least 0 and below 2"),
        ({"false_negative_margin": 2.0}, "at least 0 and below 2"),
        ({"matryoshka_dims": [8, 8]}, "different"),
        ({"matryoshka_dims": [0]}, "positive"),
        ({"matryoshka_dims": [32]}, "below the embedding's own 32"),
        ({"temperatures": {"d": 0.1}}, "the tasks are a, b, c"),
    ],
)
def test_settings_that_make_no_sense_are_refused(folder, options, said):
    with pytest.raises(ValueError, match=said):
        objective(load_backbone(folder), folder, options)
