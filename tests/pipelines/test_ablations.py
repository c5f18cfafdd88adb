"""Every row of docs/ablations.md is what it says: the recipe loads, differs in that alone, and shares with the full run what is said.

No step runs here: tests/e2e/test_ablation.py takes one to its end.
"""

import re
import shlex
from pathlib import Path

import pytest

from pipelines import full
from pipelines.dag import build, left_out
from pipelines.recipe import Recipe, load_recipe
from pipelines.runner.plan import make_plan
from pipelines.steps.finetune import FinetuneConfig, task_weights
from pipelines.tracked import canonical_settings, flatten

GUIDE = (Path(__file__).parents[2] / "docs" / "ablations.md").read_text()
ROW = re.compile(r"^\| (?P<name>[^|]+) \| `(?P<settings>--set [^|]+)` \| (?P<shared>`[^|]+`) \|$", re.MULTILINE)
ROWS = {
    row["name"]: (shlex.split(row["settings"]), re.findall(r"`(\w+)`", row["shared"])) for row in ROW.finditer(GUIDE)
}

ALL = ["corpus", "pairs", "clean", "base", "pack", "pretrain", "finetune", "evaluate", "export"]
WITHOUT = [step for step in ALL if step not in ("pack", "pretrain")]
EXPECTED = {  # settings that differ from the demo's, and the steps
    "without MLM": ({"pretrain.mlm_ratio": "0.0", "pretrain.mlm_weight": "0.0"}, ALL),
    "without MAE": ({"pretrain.mae_ratio": "0.0", "pretrain.mae_weight": "0.0"}, ALL),
    "without continual pre-training": ({"pretrain.steps": "0"}, WITHOUT),
    "without text pairs": ({"finetune.exclude": '["summary_to_text"]'}, ALL),
    "without document pairs": ({"finetune.exclude": '["summary_to_page"]'}, ALL),
    "without task-aware batches": ({"finetune.task_batches": "false"}, ALL),
    "contrastive alone (the paper's baseline, there on MMEB's pairs)": (
        {"pretrain.steps": "0", "finetune.attention": "causal"},
        WITHOUT,
    ),
    "in both stages": ({"pretrain.attention": "causal", "finetune.attention": "causal"}, ALL),
    "in fine-tuning": ({"finetune.attention": "causal"}, ALL),
}


def overrides(arguments: list[str]) -> list[str]:
    """Of `--set a=b --set c=d`."""
    assert arguments[::2] == ["--set"] * (len(arguments) // 2)
    return arguments[1::2]


def settings(recipe: Recipe) -> dict[str, str]:
    return flatten(canonical_settings(recipe))


def marks(recipe: Recipe, root: Path) -> dict[str, str]:
    return {planned.step.name: planned.fingerprint for planned in make_plan(build(recipe), str(root))}


def test_the_guide_has_all_rows():
    assert list(ROWS) == list(EXPECTED)


@pytest.mark.parametrize("row", ROWS)
def test_a_row_of_the_guide_is_what_it_says(row: str, tmp_path: Path) -> None:
    arguments, shared = ROWS[row]
    changed, steps = EXPECTED[row]
    full_run, ablation = load_recipe("demo", []), load_recipe("demo", overrides(arguments))
    before, after = settings(full_run), settings(ablation)
    assert {name: after[name] for name in after if before.get(name) != after[name]} == changed
    assert [step.name for step in build(ablation)] == steps
    here, there = marks(full_run, tmp_path), marks(ablation, tmp_path)
    assert [name for name in there if here[name] == there[name]] == shared


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
    assert [line for line in lines if line[0] != "run"] == [
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
