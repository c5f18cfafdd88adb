"""A stage goes on with another number of workers: 4, then 2, then 3 take the steps that 4 would have taken, in the same order."""

from itertools import combinations

import numpy as np
import pytest
import torch

from cluster import collectives
from cluster.engine import EngineConfig, open_engine
from moca_core.attention import set_attention
from moca_core.backbone import load_backbone
from moca_core.data.masking import blank
from moca_core.objective.contrastive import Contrastive, Gather
from moca_core.objective.contrastive_config import ContrastiveConfig
from moca_core.objective.pretraining import MaskedModelling
from moca_core.spec import read_spec
from pipelines.training.backward import InChunks, whole_batches
from pipelines.training.config import TrainingConfig
from pipelines.training.loop import train
from pipelines.training.plan import pair_plan, row_plan
from tests.ranks import on_ranks, small_weights_shared
from tests.stock import Documents, Pairs
from tests.tiny import tiny_model

FAMILY = "qwen2_5_vl"
PACKS = list(combinations(Documents.NAMES, 2))
COSTS = np.array([float(1 + number) for number in range(len(PACKS))])
LEGS = ((4, 0, 3), (2, 3, 6), (3, 6, 9))  # workers, and the steps that they take
STEPS = LEGS[-1][2]
SETTINGS = TrainingConfig(steps=STEPS, learning_rate=3e-3, decay="linear", warmup_fraction=0.3, max_grad_norm=1.0)


def rows(folder, steps):
    """Six packs a step: the 4 ranks have two or one each, and a blank one where they have one."""
    documents, plan = Documents(folder), row_plan(COSTS, 6, steps, collectives.rank(), collectives.world_size(), seed=1)
    for step in steps:
        mine = [a["row"] for a in plan if a["step"] == step]
        yield step, [blank(documents.spec) if row is None else documents.batch(*PACKS[row]) for row in mine]


def pairs(folder, steps):
    """Four pairs a step, in another order every time."""
    plan = pair_plan({"t": 4}, {"t": 1.0}, 4, steps, collectives.rank(), collectives.world_size(), seed=1)
    given = Pairs(folder)
    given.pairs = np.array(given.pairs, dtype=object)
    for address in plan:
        yield address["step"], [given.batch([row for _, row in address["pairs"]])]


def objective(folder, stage):
    torch.manual_seed(0)
    model = load_backbone(folder)
    set_attention(model, "bidirectional")
    if stage == "pretrain":
        return MaskedModelling(model, read_spec(folder))
    gather = Gather(collectives.rank(), collectives.all_gather_with_grad, collectives.all_gather)
    return Contrastive(model, read_spec(folder), ContrastiveConfig(temperature=0.1), tasks=["t"], gather=gather)


@small_weights_shared()
def leg(folder, checkpoints, stage, zero_stages, start, end):
    """{ZeRO stage: [(loss, gradient norm, sequences, content) of every step]}, from the checkpoint of `start` to that of `end`."""
    curves = {}
    for zero_stage in zero_stages:
        engine = open_engine(objective(folder, stage), EngineConfig(zero_stage=zero_stage, weight_decay=0.1))
        if start:
            assert engine.load(f"{checkpoints}/{stage}{zero_stage}/{start}") == {"step": start}
        curves[zero_stage] = []
        train(
            engine,
            engine.module,
            (rows if stage == "pretrain" else pairs)(folder, range(start, end)),
            SETTINGS,
            sum_over_ranks=collectives.all_reduce_sum,
            after_step=lambda r, seen=curves[zero_stage]: seen.append(
                (r.metrics["total"], r.metrics["grad_norm"], r.rows, r.content)
            ),
            backward_pass=whole_batches if stage == "pretrain" else InChunks(40, collectives.max_over_ranks),
        )
        engine.save(f"{checkpoints}/{stage}{zero_stage}/{end}", {"step": end})
        engine.close()
    return curves


@pytest.mark.parametrize(
    ("stage", "zero_stages"),
    [
        ("pretrain", (2,)),
        ("finetune", (2,)),
        pytest.param("pretrain", (0, 1, 3), marks=pytest.mark.slow),
        pytest.param("finetune", (0, 1, 3), marks=pytest.mark.slow),
    ],
)
def test_the_loss_curve_stays_that_of_four_workers(tmp_path, stage, zero_stages):
    folder = tmp_path / "model"
    tiny_model(folder, FAMILY)
    whole = on_ranks(leg, 4, str(folder), str(tmp_path / "whole"), stage, zero_stages, 0, STEPS)
    changed = {zero_stage: [] for zero_stage in zero_stages}
    for workers, start, end in LEGS:
        part = on_ranks(leg, workers, str(folder), str(tmp_path / "legs"), stage, zero_stages, start, end)
        for zero_stage, curve in part.items():
            changed[zero_stage] += curve
    for zero_stage in zero_stages:
        expected, found = np.array(whole[zero_stage]), np.array(changed[zero_stage])
        assert found[:, 2:].tolist() == expected[:, 2:].tolist(), "the same sequences in the same steps"
        if stage == "pretrain":  # the four pairs are all in every step
            assert len({content for *_, content in found.tolist()}) > 1, "of which not all are alike"
        np.testing.assert_allclose(found[:, :2], expected[:, :2], rtol=2e-4)
        assert abs(expected[-1, 0] - expected[0, 0]) > 0.01, "something was learned on the way"
