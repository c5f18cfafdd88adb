"""What happens after every step of a stage: verdicts, validation, snapshots, checkpoints. One process, plain torch."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from cluster.engine import EngineConfig
from cluster.torch_engine import TorchEngine
from pipelines.training.after_step import StageRun
from pipelines.training.config import StageConfig
from pipelines.training.job import Training
from pipelines.training.loop import train
from tests.pipelines.test_loop import Square, batch

VALUES = [1.0, 3.0, 2.0, 5.0, 4.0, 1.0, 2.0, 2.0]


class Worker(SimpleNamespace):
    """A worker without a cluster: its checkpoints are folders by their step."""

    rank, world_size, run_uri = 0, 1, "s3://bucket/run"

    def save(self, step, write, score=None):
        write(str(self.folder / f"{step}"))
        self.saved.append((step, score))

    def preempted(self):
        return self.notices.pop(0) if self.notices else False


class Run:
    """A stage over VALUES, one a step, from a checkpoint or from the start."""

    def __init__(self, tmp_path, start=None, values=VALUES, stop=None, notices=(), **settings):
        self.worker = Worker(folder=tmp_path, saved=[], notices=list(notices))
        self.config = StageConfig(
            **{"steps": len(values), "learning_rate": 0.1, "decay": "none", "warmup_fraction": 0} | settings
        )
        self.objective = Square()
        self.engine = TorchEngine(self.objective, EngineConfig())
        state = self.engine.load(str(tmp_path / f"{start}")) if start else None

        def given(step):
            value = values[step]
            return [batch(v) for v in value] if isinstance(value, tuple) else [batch(value)]

        training = Training(
            self.objective,
            open_at=lambda steps: ((step, given(step)) for step in steps),
            open_validation=lambda: enumerate([[batch(2.0)], [batch(4.0)]]),
            describe=lambda step: [[f"document {step}"]] * len(given(step)),
        )
        job = {"label": "stage", "log_every": 3, "checkpoint_every": 4, "snapshots": str(tmp_path / "snapshots")}
        self.run = StageRun(self.worker, self.engine, self.config, training, job, None, state)
        steps = range(self.run.state["step"], stop or len(values))
        train(
            self.engine,
            self.objective,
            training.open_at(steps),
            self.config,
            sum_over_ranks=lambda tensor: tensor,
            after_step=self.run.after_step,
            notice=self.worker.preempted,
        )


def test_a_run_that_was_interrupted_ends_as_one_that_was_not(tmp_path):
    run = partial(Run, validation_fraction=0.1, validate_every_steps=4)
    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", stop=6)
    resumed = run(tmp_path / "parts", start=4)
    assert resumed.objective.w.item() == whole.objective.w.item()
    timeless = [
        [{k: v for k, v in row.items() if k in ("step", "square", "total", "validation/total")} for row in rows]
        for one in (whole, resumed)
        for rows in (one.run.state["history"], one.run.state["validation"])
    ]
    assert timeless[1] == timeless[3] and timeless[0][-1] == timeless[2][-1]
    assert resumed.run.state["consumed"] == whole.run.state["consumed"]
    for kind in ("history", "validation"):  # one token a value
        seen = [row["tokens_seen"] for row in resumed.run.state[kind]]
        assert seen == [row["step"] + 1 for row in resumed.run.state[kind]] and seen[-1] == len(VALUES)
    assert whole.run.state["consumed"]["rows"] == 8 and json.dumps(whole.run.state)


def test_consumed_tells_other_rows_and_another_order(tmp_path):
    digests = {
        Run(tmp_path / f"{number}", values=values).run.state["consumed"]["digest"]
        for number, values in enumerate([VALUES, VALUES[::-1], [*VALUES[:-1], 7.0]])
    }
    assert len(digests) == 3


def test_validation_scores_the_checkpoints_and_is_of_the_weights_at_that_moment(tmp_path):
    run = Run(tmp_path, validation_fraction=0.1, validate_every_steps=3)
    assert [step for step, _ in run.worker.saved] == [3, 4, 6, 8]
    scores = dict(run.worker.saved)
    assert scores[4] is None and [row["step"] for row in run.run.state["validation"]] == [2, 5, 7]
    w = run.objective.w.item()
    assert scores[8] == pytest.approx(((2 * w - 1) ** 2 + (4 * w - 1) ** 2) / 2)
    assert run.run.state["validation"][-1]["validation/square"] == pytest.approx(scores[8])


def test_an_error_names_the_step_the_documents_and_the_last_good_checkpoint(tmp_path):
    with pytest.raises(FloatingPointError) as error:
        Run(tmp_path, values=[*VALUES[:5], float("nan"), 1.0])
    for part in ("stage, step 5", "rank 0: document 5", "s3://bucket/run, step 4", "'square': nan", "was made of"):
        assert part in str(error.value)
    with pytest.raises(FloatingPointError, match=r"Not finite by themselves are rank 0: document 1\. "):
        Run(tmp_path / "one", values=[1.0, (1.0, float("nan"))])
    with pytest.raises(FloatingPointError, match="none yet"):
        Run(tmp_path / "early", values=[float("nan")])


def test_snapshots_hold_the_weights_of_their_steps(tmp_path):
    run = Run(tmp_path, snapshots=(3, 5))
    weights = [load_file(tmp_path / "snapshots" / f"step_{step:08d}" / "weights.safetensors")["w"] for step in (3, 5)]
    early = Run(tmp_path / "early", values=VALUES[:3])
    assert torch.equal(weights[0], early.objective.w.detach()) and not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], run.objective.w.detach())


def test_a_notice_saves_once_at_its_step(tmp_path):
    run = Run(tmp_path, notices=[False, True, True, True])
    assert [step for step, _ in run.worker.saved] == [2, 4, 8]


def test_what_was_observed_late_is_kept(tmp_path):
    run = Run(tmp_path)  # steps 7 and 8 of 8
    assert run.run.state["observed"]["values"] == [1, 2.0]
    assert Run(tmp_path, values=VALUES[:5]).run.state["observed"]["values"] == [1, 4.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation_fraction": 0.1}, "set both"),
        ({"validate_every_steps": 5}, "set both"),
        ({"validation_fraction": 0.5, "validate_every_steps": 5}, "below 0.5"),
        ({"keep": "best"}, "needs a loss to compare"),
        ({"snapshots": (10,)}, r"snapshots=\[10\] must be steps between 1 and steps - 1 = 9"),
        ({"abort_above": 0.9}, "abort_above=0.9"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        StageConfig(steps=10, learning_rate=0.1, **settings)
