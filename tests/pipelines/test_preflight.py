"""What a recipe needs against what a cluster has, before the first step."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.machines import Machine, _smallest_gpu
from pipelines.dag import build
from pipelines.memory import Weights
from pipelines.preflight.check import check, giga
from pipelines.preflight.demand import Demand, demands
from pipelines.preflight.model import Model, model_of
from pipelines.preflight.run import NoRoom, preflight
from pipelines.recipe import load_recipe
from pipelines.runner.plan import Planned, make_plan
from pipelines.runner.step import Step
from tests.pipelines.test_sizing import SPEC_3B
from tests.tiny import tiny_model

BOX = Machine("10.0.0.2", 64, 8, False, 400e9, 150e9, 900e9, "NVIDIA H100 80GB HBM3", 85.0e9)
DATA = Machine("10.0.0.3", 32, 0, False, 200e9, 70e9, 400e9)
LARGE = Weights(3_800_000_000, 3_800_000_000, 311_000_000)


def verdicts(demand: Demand, *machines: Machine, most: dict | None = None) -> dict[str, bool | None]:
    """{first word of a finding: whether it is met}"""
    return {finding.what.split(":")[0]: finding.met for finding in check([demand], list(machines), most)}


TRAINS = Demand("pretrain", 8, 8, 2, 1, device=80e9, host=15e9, store=1e9, scratch=60e9, parts={"weights": 8e9})


def test_a_node_of_eight_gpus_holds_eight_workers():
    room, gpu, host, store, disk = check([TRAINS], [BOX, DATA], None)
    assert all(finding.met for finding in (room, gpu, host, store, disk))
    assert "8 worker(s) of 2 CPU, 1 GPU; 96 CPU, 8 GPU on 2 machine(s): room for 8" in room.what
    assert "GPU memory: 80 GB a worker (weights 8); NVIDIA H100 80GB HBM3 has 85" in gpu.what
    assert "host memory: 8 x 15 GB of 400 on 10.0.0.2" in host.what


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({"workers": 9, "fewest": 9}, "9 worker(s) of 2 CPU, 1 GPU; 96 CPU, 8 GPU on 2 machine(s)"),
        ({"cpus": 9}, "8 worker(s) of 9 CPU, 1 GPU; 96 CPU, 8 GPU on 2 machine(s)"),
        ({"device": 86e9}, "GPU memory"),
        ({"host": 51e9}, "host memory"),
        ({"store": 19e9}, "object store"),
        ({"scratch": 901e9}, "disk"),
    ],
)
def test_what_is_too_much_is_named_and_nothing_else(change, broken):
    found = verdicts(replace(TRAINS, **change), BOX, DATA)
    assert [name for name, met in found.items() if not met] == [broken] and found[broken] is False


def test_workers_that_leave_no_cpu_to_what_feeds_them_are_refused():
    box = replace(BOX, cpus=16)
    starved = "CPU for the tasks that feed them"
    assert verdicts(TRAINS, box)[starved] is False
    assert starved not in verdicts(TRAINS, box, DATA)
    assert starved not in verdicts(replace(TRAINS, cpus=1.9), box)
    assert verdicts(TRAINS, box, most={"CPU": 64, "GPU": 8})[starved] is None
    assert verdicts(Demand("evaluate", 16, 1, 1, 0), box)[starved] is False
    assert starved not in verdicts(Demand("evaluate", 15, 1, 1, 0), box)


def test_fewer_workers_will_do_where_the_recipe_says_so():
    assert verdicts(replace(TRAINS, workers=16), BOX)["GPU memory"] is True
    assert all(finding.met for finding in check([replace(TRAINS, workers=16)], [BOX], None))
    assert not all(finding.met for finding in check([replace(TRAINS, workers=16, fewest=16)], [BOX], None))


def test_what_an_autoscaler_may_bring_is_waited_for_and_what_it_never_brings_is_not():
    (may,) = check([TRAINS], [DATA], {"CPU": 96, "GPU": 8})
    (never,) = check([TRAINS], [DATA], {"CPU": 96, "GPU": 4})
    assert may.met is None and never.met is False
    assert never.what.endswith("96 CPU, 4 GPU when it has grown")


def test_without_gpus_a_machine_must_hold_all_of_its_workers():
    demand = replace(TRAINS, workers=2, fewest=2, gpus=0, device=150e9, host=0.0)
    assert verdicts(demand, DATA)["memory"] is False
    assert verdicts(replace(demand, device=100e9), DATA)["memory"] is True


def test_labelled_machines_alone_train():
    labelled = replace(DATA, address="10.0.0.4", cpus=2, training=True)
    demand = Demand("pretrain", 2, 2, 2, 0)
    (few,) = check([demand], [DATA, labelled], None)
    assert few.met is False and "2 CPU, 0 GPU on 1 machine(s): room for 1" in few.what
    for step in ("finetune", "evaluate"):  # of one worker too
        (alone,) = check([Demand(step, 1, 1, 3, 0)], [DATA, labelled], None)
        assert alone.met is False and "on 1 machine(s): room for 0" in alone.what
    (rest,) = check([Demand("corpus", 1, 1, 1, 0)], [DATA, labelled], None)
    assert rest.met and "2 machine(s)" in rest.what


def test_a_gpu_that_nobody_can_look_at_is_said():
    assert verdicts(TRAINS, replace(BOX, gpu_bytes=0.0))["GPU memory"] is None


def test_the_papers_recipe_on_one_node():
    """Of eight GPUs of 80 GB, as the recipe says; not without checkpointing of activations, and not unshared."""
    model = Model(SPEC_3B, {"pretrain": LARGE, "finetune": LARGE}, {"pretrain": True, "finetune": True})
    for settings, fits in (
        ([], True),
        (["cluster.activation_checkpointing=none"], False),
        (["cluster.zero_stage=0"], False),
    ):
        recipe = load_recipe("moca_3b", settings)
        plan = [Planned(Step("pretrain", print, recipe.pretrain, (), 1), {}, "", "", None, "")]
        (demand,) = demands(recipe, plan, model)
        assert (demand.workers, demand.cpus, demand.gpus) == (8, 2, 1)
        assert demand.device == pytest.approx(sum(demand.parts.values()), rel=0.1)
        assert all(f.met for f in check([demand], [BOX], None)) == fits, [giga(demand.device), demand.parts]


def test_sizes_of_a_model_are_read_from_its_settings_alone(tmp_path: Path):
    """The same as those of the objectives with their weights."""
    from moca_core.backbone import load_backbone
    from moca_core.lora import add_adapters
    from moca_core.objective.pretraining import MaskedModelling
    from moca_core.spec import read_spec

    folder = str(tmp_path / "model")
    tiny_model(folder, "qwen2_5_vl")
    for file in Path(folder).glob("*.safetensors"):
        file.rename(tmp_path / file.name)
    settings = [f"base.model={folder}", "pretrain.freeze=[vision, merger]", "finetune.lora={rank: 4}"]
    recipe = load_recipe("demo", settings)
    model = model_of(recipe, make_plan(build(recipe), str(tmp_path / "root")))
    for file in tmp_path.glob("*.safetensors"):
        file.rename(Path(folder, file.name))
    assert model.spec == read_spec(folder) and model.sees == {"pretrain": False, "finetune": False}
    real = load_backbone(folder)
    objective = MaskedModelling(real, model.spec)
    assert model.of["pretrain"].total == sum(p.numel() for p in objective.parameters())
    vision = sum(p.numel() for p in real.model.visual.parameters())
    assert model.of["pretrain"].trained == model.of["pretrain"].total - vision
    add_adapters(real, recipe.finetune.lora, 0)
    trained = sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert model.of["finetune"].trained == trained


def test_the_smallest_gpu_of_a_machine_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771'\necho 'NVIDIA A100, 80GB, 81920'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert _smallest_gpu() == ("NVIDIA A100, 80GB", 81920.0)
    monkeypatch.setenv("PATH", "/nowhere")
    assert _smallest_gpu() == ("", 0.0)


def test_plans_side_by_side_need_room_for_the_training_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers of half a CPU each, on two and a half CPUs: two plans fit, three do not. Steps that take turns ask for no more."""
    small = Machine("10.0.0.4", 2.5, 0, False, 8e9, 1e9, 40e9)
    monkeypatch.setattr("pipelines.preflight.run.machines", lambda: [small])
    monkeypatch.setattr("pipelines.preflight.run.most_of_autoscaler", lambda: None)
    recipe = load_recipe("demo", ["cluster.worker_start_timeout_s=0.01"])
    plan, said = make_plan(build(recipe), str(tmp_path)), []
    preflight(recipe, plan, said.append, at_once=2)
    assert any("4 worker(s) of 0.5 CPU; 2.5 CPU, 0 GPU on 1 machine(s): room for 5" in line for line in said)
    with pytest.raises(NoRoom, match=r"NO\s+pretrain\s+6 worker\(s\) of 0.5 CPU; .* room for 5") as refused:
        preflight(recipe, plan, said.append, at_once=3)
    assert "corpus" not in str(refused.value) and "evaluate" not in str(refused.value)
