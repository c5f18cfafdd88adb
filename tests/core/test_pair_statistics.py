"""What is reported of a batch, counted by hand."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from cluster import collectives
from moca_core.backbone import load_backbone
from moca_core.loss.infonce import infonce, right_answers
from moca_core.objective import pair_statistics as statistics_file
from moca_core.objective.contrastive import Contrastive, Encoded, Gather
from moca_core.objective.contrastive_config import ContrastiveConfig
from moca_core.objective.pair_statistics import BINS, SCALARS, histograms, pair_statistics, read
from moca_core.spec import read_spec
from tests.core.made_up_pairs import TASKS, scene
from tests.ranks import on_ranks
from tests.stock import cosine, is_right

CONFIG = ContrastiveConfig(temperature=0.1, temperatures={"b": 0.2}, false_negative_margin=0.05)
WHOLE = scene(32, seed=3)


def sums_of(folder, rank=0, world=1, gather=None):
    module = Contrastive(load_backbone(folder), read_spec(folder), CONFIG, tasks=TASKS, gather=gather)
    vectors = normalize(WHOLE.vectors_of(rank, world), dim=1)
    term = module.score(Encoded(vectors, None), WHOLE.batch(rank, world))["pairs"]
    assert term.sum.dtype == torch.float64 and not term.sum.requires_grad
    return term.sum


def on_a_rank(folder):
    rank, world = collectives.rank(), collectives.world_size()
    gather = Gather(rank, collectives.all_gather_with_grad, collectives.all_gather)
    return collectives.all_reduce_sum(sums_of(folder, rank, world, gather))


def by_hand():
    """{task: list of what is found for its queries}."""
    queries, candidates = WHOLE.told(WHOLE.vectors, torch.zeros(len(TASKS)))
    found = {task: [] for task in TASKS}
    for q, query in enumerate(queries):
        own = [c for c in candidates if c.owner == q and c.right]
        wrong = [cosine(query.vector, c.vector).item() for c in candidates if not is_right(queries, candidates, q, c)]
        for answer in own:
            near = cosine(query.vector, answer.vector).item()
            left = [s for s in wrong if s <= near + 0.05]
            masked = len(candidates) - len(own) - len(left)
            won = all(s < near for s in wrong)
            found[TASKS[WHOLE.source[q]]].append((1 / len(own), near, left, masked, won))
    return found


@pytest.fixture(scope="module", params=[1, 2])
def sums(request, folder):
    return on_ranks(on_a_rank, request.param, folder)


def test_scalars_are_means_over_the_queries_of_a_task(sums):
    told = read(sums, TASKS)
    for task, rows in by_hand().items():
        queries = sum(weight for weight, *_ in rows)
        negatives = sum(weight * len(left) for weight, _, left, _, _ in rows)
        masked = sum(weight * gone for weight, _, _, gone, _ in rows)
        assert told[f"queries/{task}"] == round(queries) == (WHOLE.source == TASKS.index(task)).sum()
        assert told[f"negatives/{task}"] == pytest.approx(negatives / queries)
        assert told[f"masked/{task}"] == pytest.approx(masked / (masked + negatives))
        assert told[f"accuracy/{task}"] == pytest.approx(sum(w * won for w, *_, won in rows) / queries)
        assert told[f"temperature/{task}"] == pytest.approx(0.2 if task == "b" else 0.1)
    assert len(told) == 5 * len(TASKS)


def test_histograms_hold_every_similarity_once(sums):
    drawn = histograms(sums, TASKS)
    for task, rows in by_hand().items():
        weights = [weight for weight, *_ in rows]
        right = np.histogram([near for _, near, *_ in rows], BINS, (-1, 1), weights=weights)[0]
        spread = np.array([(s, weight) for weight, _, left, *_ in rows for s in left]).T
        wrong = np.histogram(spread[0], BINS, (-1, 1), weights=spread[1])[0]
        np.testing.assert_allclose(drawn[task][0], right, atol=1e-6)
        np.testing.assert_allclose(drawn[task][1], wrong, atol=1e-6)


def test_any_block_gives_the_same(folder, monkeypatch):
    expected = sums_of(folder)
    monkeypatch.setattr(statistics_file, "BLOCK", 7)
    torch.testing.assert_close(sums_of(folder), expected)


def test_unseen_tasks_are_not_told(sums):
    sums = sums.clone()
    sums[1] = 0
    assert {name.split("/")[1] for name in read(sums, TASKS)} == set(histograms(sums, TASKS)) == {"a", "c"}


def test_vectors_that_are_not_numbers_fall_in_some_bin(folder):
    """The loop says which batch it was; nothing breaks before it can."""
    module = Contrastive(load_backbone(folder), read_spec(folder), CONFIG, tasks=TASKS)
    terms = module.score(Encoded(WHOLE.vectors * torch.nan, None), WHOLE.batch())
    assert terms["contrastive"].sum.isnan() and terms["accuracy"].sum == 0


def test_no_value_is_read_back_from_the_device():
    """On a device without values whatever asks for one fails."""
    with torch.device("meta"):
        rows, columns, numbers, ones = (
            torch.ones(5, 8),
            torch.ones(9, 8),
            torch.zeros(5, dtype=torch.long),
            torch.ones(5),
        )
        answers, candidates = (torch.zeros(*shape, dtype=torch.long) for shape in ((5, 1, 2), (9, 2)))
        known = right_answers(answers, numbers, candidates, candidates[:, 0])
        compared = infonce(rows, columns, numbers, known, ones, margin=0.1)
        sums = pair_statistics(compared, target=numbers, temperature=ones, weight=ones, source=numbers, tasks=3)
    assert sums.shape == (3, len(SCALARS) + 2 * BINS) and sums.is_meta
    with pytest.raises(RuntimeError):
        sums[0, 0].item()
