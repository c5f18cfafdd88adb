"""The step `average`: in the graph where it is asked for, and then what is scored and exported."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from moca_core.attention import set_attention
from moca_core.backbone import load_backbone, save_backbone
from moca_core.data.schema import task_to_tables
from moca_core.spec import read_spec
from moca_core.types import EvalTask, Query
from pipelines.dag import build
from pipelines.recipe import load_recipe
from pipelines.runner.plan import make_plan
from pipelines.runner.record import Artifact
from pipelines.steps.average import AverageConfig, average_step
from pipelines.steps.evaluate import EvaluateConfig, evaluate_step
from pipelines.steps.export import ExportConfig, export_step
from tests.core.samples import image, text, words
from tests.pipelines.conftest import Books, run_step, units_here
from tests.tiny import tiny_model


def planned(root: Path, *settings: str) -> dict[str, tuple[tuple[str, ...], str]]:
    """{step: (what it needs, its fingerprint)} of the demo with these settings."""
    plan = make_plan(build(load_recipe("demo", list(settings))), str(root))
    return {p.step.name: (p.step.needs, p.fingerprint) for p in plan}


@pytest.mark.parametrize(
    "settings", [["average.base_share=0.2"], ["average.snapshots=true", "finetune.snapshots=[300]", "pretrain.steps=0"]]
)
def test_the_step_is_there_where_it_is_asked_for_and_nothing_before_it_changes(tmp_path, settings):
    without, given = planned(tmp_path, *settings[1:]), planned(tmp_path, *settings)
    assert list(given) == [*list(without)[:-2], "average", "evaluate", "export"]
    assert given["average"][0] == ("base", "finetune")
    for name in ("evaluate", "export"):
        assert "average" in given[name][0] and "average" not in without[name][0]
    assert all(given[name] == without[name] for name in list(without)[:-2])
    assert given["finetune"][0] == (("base", "pairs") if len(settings) == 3 else ("base", "pretrain", "pairs"))


def test_what_is_off_changes_nothing(tmp_path):
    assert planned(tmp_path) == planned(tmp_path, "average.base_share=0", "average.snapshots=false")
    assert "average" not in planned(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["average.base_share=1.5"], "average: base_share=1.5 must be at least 0 and at most 1"),
        (["average.snapshots=true"], "average.snapshots=true with no finetune.snapshots: name the steps"),
        (["average.snapshots=true", "average.base_share=1"], "snapshots=true with base_share=1.0: nothing is left"),
        (
            ["average.base_share=0.1", "evaluate.models=[finetune]"],
            "must name average: it is the model that is exported",
        ),
        (["evaluate.models=[finetune, average]"], "evaluate.models names average, and there is none"),
        (["evaluate.models=[base]"], "evaluate.models must name finetune: it is the model that is exported"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("demo", settings)


@pytest.fixture
def in_process(monkeypatch):
    """What the steps run as tasks runs here: other tests see to Ray."""
    for module in ("pipelines.steps.average", "pipelines.steps.export", "pipelines.evaluation.engine"):
        monkeypatch.setattr(f"{module}.run_tasks", lambda fn, items, **_: [fn(*item) for item in items])
    monkeypatch.setattr("pipelines.evaluation.engine.run_units", units_here)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Artifact]:
    """A base model, and a fine-tuned one with a snapshot, whose weights are the base's plus noise; one task."""
    root = tmp_path_factory.mktemp("trained")
    tiny_model(root / "base", "qwen2_5_vl")
    for seed, name in enumerate(("model", "snapshots/3")):
        model = load_backbone(str(root / "base"))
        set_attention(model, "bidirectional")
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        shutil.copytree(root / "base", root / name)
        save_backbone(model, str(root / name))
    candidates = (*((text(words(5, n)),) for n in range(4)), (image(60, 60, 1),))
    queries = tuple(Query((text(words(6, n + 9)),), (n,)) for n in range(3))
    (root / "task").mkdir()
    for part, table in zip(("queries", "candidates"), task_to_tables(EvalTask("t", queries, candidates)), strict=True):
        pq.write_table(table, root / "task" / f"{part}.parquet")
    result = {"steps": 4, "attention": "bidirectional", "first": {}, "last": {}}
    return {
        "base": Artifact(
            str(root), {"model": "base", "parameters": 1, "spec": read_spec(str(root / "base")).to_dict()}
        ),
        "finetune": Artifact(str(root), result | {"model": "model", "snapshots": ["snapshots/3"]}),
        "pairs": Artifact(str(root), {"train": {}, "tasks": {"t": {"path": "task", "queries": 3}}}),
    }


def weights(artifact: Artifact, folder: str | None = None) -> dict[str, torch.Tensor]:
    return load_backbone(artifact.path(folder or artifact.result["model"])).state_dict()


class Registry(Books):
    def log_model(self, name: str, *rest: object, output_shape: tuple[int, ...]) -> str:
        return f"models:/{name}"

    def register_model(self, name: str, uri: str, alias: str, description: str) -> str:
        return "1"


def test_the_average_is_scored_and_exported(trained, in_process, tmp_path):
    base, finetune, pairs = trained["base"], trained["finetune"], trained["pairs"]
    books = Books()
    step = average_step(AverageConfig(snapshots=True, base_share=0.2))
    average = run_step(step, str(tmp_path / "average"), books, base=base, finetune=finetune)
    shares = {"finetune/model": 0.4, "finetune/snapshots/3": 0.4, "base/base": 0.2}
    assert average.result["shares"] == shares and average.result["attention"] == "bidirectional"
    assert books.metrics == {f"share/{name}": share for name, share in shares.items()}
    mean, parts = weights(average), [weights(finetune), weights(finetune, "snapshots/3"), weights(base)]
    for name, weight in mean.items():
        by_hand = sum(share * part[name] for share, part in zip(shares.values(), parts, strict=True))
        torch.testing.assert_close(weight, by_hand)

    evaluate = run_step(
        evaluate_step(EvaluateConfig(), ("finetune", "average")),
        str(tmp_path / "evaluate"),
        pairs=pairs,
        finetune=finetune,
        average=average,
    )
    assert list(evaluate.result["scores"]["t"]) == ["chance", "finetune", "average"]
    assert evaluate.result["attention"]["average"] == "bidirectional"

    inputs = {"base": base, "finetune": finetune, "average": average, "pairs": pairs, "evaluate": evaluate}
    step = export_step(ExportConfig(), ("base", "finetune", "average"))
    exported = run_step(step, str(tmp_path / "export"), Registry(), **inputs)
    there = weights(exported)
    assert all(torch.equal(there[name], mean[name]) for name in mean if name != "lm_head.weight")
    assert any(not torch.equal(there[name], parts[0][name]) for name in mean)
    card = Path(exported.path("model/README.md")).read_text()
    assert "its weights are a mean of 3 models" in card and "- average: attention bidirectional, share of " in card


def test_without_snapshots_only_the_base_is_mixed_in(trained, in_process, tmp_path):
    step = average_step(AverageConfig(base_share=1.0))
    average = run_step(step, str(tmp_path), base=trained["base"], finetune=trained["finetune"])
    assert average.result["shares"] == {"finetune/model": 0.0, "base/base": 1.0}
    mean, before = weights(average), weights(trained["base"])
    assert all(torch.equal(mean[name], before[name]) for name in before)
