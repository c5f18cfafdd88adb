"""Settings that leave something out: how the steps are wired then, and what is refused.

Variants of studies are in test_study.py. No step runs here: tests/e2e/test_ablation.py takes one to its end.
"""

import re
from pathlib import Path

import pytest

from pipelines import full
from pipelines.dag import build, left_out
from pipelines.recipe import load_recipe
from pipelines.steps.finetune import FinetuneConfig, task_weights
from pipelines.studies.family import AXES, FAMILIES

GUIDE = (Path(__file__).parents[2] / "docs" / "studies.md").read_text()
ALL = ["corpus", "pairs", "clean", "base", "pack", "pretrain", "finetune", "evaluate", "export"]
WITHOUT = [step for step in ALL if step not in ("pack", "pretrain")]


def test_the_guide_names_the_variants_of_both_families() -> None:
    named = set(
        re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in GUIDE.splitlines() if line.startswith("| `")))
    )
    recipe = load_recipe("demo", [])
    assert {variant.name for variant in FAMILIES["ablation"](recipe)} <= named
    axes = {variant.axis for variant in FAMILIES["scaling"](recipe)} - {""}
    assert all(f"| `{axis}_*` |" in GUIDE for axis in axes) and axes == set(AXES)


def test_the_recipe_of_the_guide_loads(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    (text,) = re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)
    path.write_text(text)
    recipe = load_recipe(str(path), [])
    assert recipe.pretrain.steps == 0 and recipe.finetune.attention == "causal" and not recipe.finetune.task_batches
    assert task_weights(recipe.finetune, {"digit_to_name": 9, "summary_to_text": 9, "summary_to_page": 9}) == {
        "digit_to_name": 9.0
    }


def test_without_pretraining_the_stages_are_wired_to_the_base() -> None:
    steps = {step.name: step for step in build(load_recipe("demo", ["pretrain.steps=0"]))}
    assert steps["finetune"].needs == ("base", "pairs")
    assert steps["evaluate"].config.models == ("base", "finetune") and "pretrain" not in steps["evaluate"].needs
    assert steps["export"].needs == ("base", "finetune", "pairs", "evaluate")
    whole = {step.name: step for step in build(load_recipe("demo", []))}
    assert whole["finetune"].needs == ("base", "pretrain", "pairs")
    assert whole["evaluate"].config.models == ("base", "pretrain", "finetune")


def test_without_pretraining_a_given_base_needs_no_corpus(tmp_path: Path) -> None:
    recipe = load_recipe("demo", ["pretrain.steps=0", f"base.model={tmp_path}"])
    assert [step.name for step in build(recipe)] == ["pairs", "base", "finetune", "evaluate", "export"]
    assert set(left_out(recipe)) == {"corpus", "clean", "pack", "pretrain"}
    assert left_out(load_recipe("demo", [f"base.model={tmp_path}"])) == {}


def test_the_plan_shows_what_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert full.main(["--dry-run", "--root", str(tmp_path), "--set", "pretrain.steps=0"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [line[1] for line in lines if line[0] == "run"] == WITHOUT
    assert [line for line in lines if line[0] not in ("run", "needs")] == [
        ["off", "pack", "pretrain.steps=0"],
        ["off", "pretrain", "pretrain.steps=0"],
    ]


@pytest.mark.parametrize("step", ["pretrain", "pack"])
def test_a_step_that_is_left_out_is_no_goal(step: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--dry-run", "--root", str(tmp_path), "--set", "pretrain.steps=0", "--until"]
    assert full.main([*arguments, step]) == 2
    assert f"--until {step}: pretrain.steps=0 leaves pack, pretrain out" in capsys.readouterr().err
    assert full.main([*arguments, "pretrian"]) == 2
    assert "unknown step 'pretrian'; the steps are corpus, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["pretrain.steps=-1"], "pretrain: steps=-1 must be at least 0"),
        (["finetune.steps=0"], "finetune: steps=0 must be at least 1"),
        (["base.steps=0"], "base: steps=0 must be at least 1"),
        (["finetune.attention=both"], "finetune.attention='both' must be one of bidirectional, causal"),
        (
            ["pretrain.steps=0", "evaluate.models=[base,pretrain,finetune]"],
            "evaluate.models=.* names pretrain, which pretrain.steps=0 leaves out",
        ),
        (["finetune.exclude=digit*"], r"finetune.exclude='digit\*' must be a list"),
        (
            ["finetune.exclude=[digit*]", "finetune.weights={digit_to_name: 1, text_to_plot: 2}"],
            r"exclude=\['digit\*'\] matches digit_to_name, which weights names",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe("demo", changes)


def test_models_may_be_named_without_pretraining() -> None:
    recipe = load_recipe("demo", ["pretrain.steps=0", "evaluate.models=[finetune]", "pretrain.rows_per_step=3"])
    (evaluate,) = [step for step in build(recipe) if step.name == "evaluate"]
    assert evaluate.needs == ("pairs", "finetune")


SIZES = {"nli/train": 50, "nli/test": 40, "pages": 36}


@pytest.mark.parametrize(
    ("exclude", "kept"),
    [(("pages",), ["nli/train", "nli/test"]), (("nli*",), ["pages"]), (("*/te?t",), ["nli/train", "pages"])],
)
def test_excluded_tasks_are_not_drawn_and_the_others_by_their_size(exclude: tuple[str, ...], kept: list[str]) -> None:
    assert task_weights(FinetuneConfig(exclude=exclude), SIZES) == {name: float(SIZES[name]) for name in kept}


@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        (("pages", "page"), r"finetune.exclude=\['page'\] matches no task; the tasks are nli/train, nli/test, pages"),
        (("nli*", "pages"), r"finetune.exclude=.* leaves none of the tasks nli/train, nli/test, pages"),
    ],
)
def test_exclusions_that_cannot_be_meant_are_refused(exclude: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task_weights(FinetuneConfig(exclude=exclude), SIZES)


def test_only_batches_of_one_task_need_tasks_as_large() -> None:
    with pytest.raises(ValueError, match=r"tasks smaller than finetune.batch_size=38: {'pages': 36}"):
        task_weights(FinetuneConfig(batch_size=38), SIZES)
    assert set(task_weights(FinetuneConfig(batch_size=38, exclude=("pages",)), SIZES)) == {"nli/train", "nli/test"}
    assert set(task_weights(FinetuneConfig(batch_size=38, task_batches=False), SIZES)) == set(SIZES)
