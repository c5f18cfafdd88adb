"""A study: what its runs share, what it makes of scores, and the whole command over steps that take no time."""

import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moca_core.family import FAMILIES as MODELS
from pipelines import dag, study
from pipelines.preflight.run import NoRoom
from pipelines.recipe import Recipe, load_recipe
from pipelines.runner.plan import make_plan
from pipelines.runner.step import Context, Step
from pipelines.studies import sharing as studied
from pipelines.studies.family import FAMILIES, Run, runs_of
from pipelines.studies.losses import losses_of
from pipelines.studies.sharing import plan_of, sharing
from pipelines.tracked import canonical_settings, flatten

ABLATION = {  # settings that differ from the demo's, and the steps that the variant has for itself
    "full": ({}, {"corpus", "pairs", "clean", "base", "pack", "pretrain", "finetune", "evaluate"}),
    "no_pretraining": ({"pretrain.steps": "0"}, {"finetune", "evaluate"}),
    "mlm_only": (
        {"pretrain.mae_ratio": "0.0", "pretrain.mae_weight": "0.0"},
        {"pretrain", "finetune", "evaluate"},
    ),
    "mae_only": (
        {"pretrain.mlm_ratio": "0.0", "pretrain.mlm_weight": "0.0"},
        {"pretrain", "finetune", "evaluate"},
    ),
    "no_text_pairs": ({"finetune.exclude": '["summary_to_text"]'}, {"finetune", "evaluate"}),
    "no_document_pairs": ({"finetune.exclude": '["summary_to_page"]'}, {"finetune", "evaluate"}),
    "mixed_batches": ({"finetune.task_batches": "false"}, {"finetune", "evaluate"}),
    "unshifted_mlm": ({"pretrain.shift": "false"}, {"pretrain", "finetune", "evaluate"}),
    "causal": (
        {"pretrain.attention": "causal", "finetune.attention": "causal"},
        {"pretrain", "finetune", "evaluate"},
    ),
    "causal_no_pretraining": ({"pretrain.steps": "0", "finetune.attention": "causal"}, {"finetune", "evaluate"}),
    "next_token_causal": (
        {
            "pretrain.objective": "next_token",
            "pretrain.attention": "causal",
            "pretrain.mae_ratio": "0.0",
            "pretrain.mae_weight": "0.0",
            "finetune.attention": "causal",
        },
        {"pretrain", "finetune", "evaluate"},
    ),
    "next_token": (
        {
            "pretrain.objective": "next_token",
            "pretrain.attention": "causal",
            "pretrain.mae_ratio": "0.0",
            "pretrain.mae_weight": "0.0",
        },
        {"finetune", "evaluate"},  # pre-trained for next_token_causal
    ),
}


def runs(family: str, seeds: int, *changes: str) -> list[Run]:
    return runs_of("demo", list(changes), FAMILIES[family](load_recipe("demo", list(changes))), seeds)


def test_ablation_takes_away_what_it_says_and_shares_the_rest(tmp_path: Path) -> None:
    family = runs("ablation", 1)
    assert [run.variant.name for run in family] == list(ABLATION)
    usual = flatten(canonical_settings(load_recipe("demo", ["evaluate.models=[finetune]"])))
    met: set[str] = set()
    for run in family:
        changed, own = ABLATION[run.variant.name]
        found = flatten(canonical_settings(run.recipe))
        assert {name: value for name, value in found.items() if usual.get(name) != value} == changed
        plan = plan_of(run, str(tmp_path))
        assert {planned.step.name for planned in plan if planned.fingerprint not in met} == own
        met |= {planned.fingerprint for planned in plan}


def test_seeds_vary_training_alone_and_the_count_is_that_of_distinct_steps(tmp_path: Path) -> None:
    family = runs("ablation", 3, "pretrain.seed=5", "finetune.seed=7")
    assert [run.seed for run in family] == [0] * 12 + [1] * 12 + [2] * 12
    assert {(run.recipe.pretrain.seed - 5, run.recipe.finetune.seed - 7) for run in family} == {
        (s, s) for s in range(3)
    }
    counted = sharing([plan_of(run, str(tmp_path)) for run in family])
    with_pretraining, without = 10, 2
    assert counted.singly == 3 * (8 * with_pretraining + 6 * without)
    own = sum(len(steps) for steps in [own for _, own in ABLATION.values()][1:])
    assert counted.distinct == 5 + 3 * (3 + own)  # corpus, pairs, clean, base, pack serve all seeds
    assert counted.done == 0 and counted.distinct < counted.singly / 2


def test_scaling_holds_the_data_of_batches_and_has_at_least_four_points_of_steps(tmp_path: Path) -> None:
    family = {run.variant.name: run.recipe for run in runs("scaling", 1)}
    full = family["full"]
    steps = [r.pretrain.steps for name, r in family.items() if name.startswith("steps_")]
    assert steps == [25, 50, 100, 400] and full.pretrain.steps == 200
    for name, recipe in family.items():
        if name.startswith("rows_"):
            assert recipe.pretrain.rows_per_step * recipe.pretrain.steps == 400
        if name.startswith("pairs_"):
            assert recipe.finetune.batch_size * recipe.finetune.steps == 32 * 380
    wide, narrow = family["width_2"].base.tiny, family["width_0.5"].base.tiny
    assert (wide.text_hidden, wide.text_heads, wide.vision_hidden, wide.vision_heads) == (256, 8, 192, 6)
    assert (narrow.text_hidden, narrow.text_heads, narrow.text_kv_heads) == (64, 2, 1)
    assert [r.pretrain.data_fraction for name, r in family.items() if name.startswith("data_")] == [0.125, 0.25, 0.5]
    assert (narrow.vision_hidden, narrow.vision_heads, narrow.vision_intermediate) == (64, 2, 171)  # 256 / 96 of 64
    given = load_recipe("demo", [f"base.model={tmp_path}"])
    assert not any(variant.axis == "width" for variant in FAMILIES["scaling"](given))


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("recipe", ["demo", "study_cpu", "study_gpu", "docs/recipes/kicad_study.yaml"])
def test_every_recipe_of_a_tiny_model_can_be_widened_in_every_family(recipe: str, family: str) -> None:
    """Qwen2-VL knows inner sizes as multiples of the hidden size, which the default is not."""
    settings = [f"base.tiny.family={family}"]
    if family == "qwen2_vl" and recipe != "study_gpu":
        settings.append("base.tiny.vision_intermediate=288")
    widths = [v for v in FAMILIES["scaling"](load_recipe(recipe, settings)) if v.axis == "width"]
    assert len(runs_of(recipe, settings, widths, 1)) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["finetune.snapshots=[300]"],
            r"variant pairs_2 \(.*\): finetune: snapshots=\[300\] must be steps between 1 and",
        ),
        (["finetune.batch_size=4"], r"variant pairs_0.25 \(.*\): finetune: batch_size=1 must be at least 2"),
    ],
)
def test_a_variant_that_is_refused_is_refused_before_any_run(
    changes: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(ValueError, match=message):
        runs("scaling", 1, *changes)
    given = [word for change in changes for word in ("--set", change)]
    assert study.main(["scaling", "--root", str(tmp_path), *given]) == 2
    assert "error: variant pairs_" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["study_cpu", "study_gpu", "moca_3b"])
def test_every_size_has_the_whole_family(name: str) -> None:
    for family, least in (("ablation", 10), ("scaling", 12)):
        names = {run.variant.name for run in runs_of(name, [], FAMILIES[family](load_recipe(name, [])), 1)}
        assert len(names) >= least and {"full", "no_pretraining"} <= names


def test_two_variants_of_one_recipe_are_refused() -> None:
    with pytest.raises(ValueError, match="variant mixed_batches is the same recipe as full"):
        runs("ablation", 1, "finetune.task_batches=false")


class Books:
    """Stands for MLflow: runs with their parents, and what was logged."""

    def __init__(self) -> None:
        self.runs: list[dict] = []

    def start_run(self, name: str, parent: "BookRun | None" = None, tags: dict | None = None) -> "BookRun":
        self.runs.append({"name": name, "parent": parent and parent.page["name"], "metrics": {}, "artifacts": []})
        return BookRun(str(len(self.runs) - 1), self.runs[-1])


class BookRun:
    def __init__(self, run_id: str, page: dict) -> None:
        self.run_id, self.page = run_id, page

    def log_params(self, params: dict) -> None: ...

    def log_metrics(self, metrics: dict, step: int | None = None) -> None:
        self.page["metrics"] |= metrics

    def log_artifact(self, path: str) -> None:
        assert Path(path).stat().st_size
        self.page["artifacts"].append(Path(path).name)

    def finish(self, status: str) -> None:
        self.page["status"] = status


class Attached(BookRun):
    """Keeps metrics to itself until they are flushed, as a run that was attached to does."""

    def log_metrics(self, metrics: dict, step: int | None = None) -> None:
        self.kept = metrics

    def flush(self) -> None:
        super().log_metrics(self.kept)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], Books, set[str]]:
    """(steps that ran, MLflow's stand-in, steps that shall fail where pre-training restores no patches): every step takes no time, and
    scores depend on whether there was pre-training."""
    ran: list[str] = []
    broken: set[str] = set()
    books = Books()

    def fake(context) -> dict:
        ran.append(context.step)
        if context.step in broken and not context.config.mae_weight:
            raise FloatingPointError("the loss is nan")
        if context.step in ("pretrain", "finetune"):
            rows = [{"tokens_seen": 500 * (n + 1), "mlm": 4.0 - n, "contrastive": 2.0 - n} for n in (0, 1)]
            held = [{"tokens_seen": 1000, "validation/mlm": 3.5}] if context.step == "pretrain" else []
            context.keep("history.json", json.dumps({"history": rows, "validation": held}).encode())
            last = {"mlm": 3.0, "total": 3.0} if context.step == "pretrain" else {"contrastive": 1.0, "accuracy": 0.5}
            before = "pretrain" in context.inputs
            return {"tokens_seen": 1000, "flops": 5e6, "last": last, "pretrained": before, "seed": context.config.seed}
        if context.step != "evaluate":
            return {}
        tuned = context.inputs["finetune"].result
        right = 30 + 15 * tuned["pretrained"] + tuned["seed"]
        path = Path(context.path("rankings", "finetune", "task.parquet"))
        path.parent.mkdir(parents=True)
        values = [1.0] * right + [0.0] * (50 - right)
        graded = [(1 + value) / 2 for value in values]
        pq.write_table(pa.table({"precision_at_1": values, "ndcg_at_10": graded, "chance": [0.02] * 50}), path)
        return {"rankings": {"finetune": {"task": "rankings/finetune/task.parquet"}}}

    monkeypatch.setattr(
        "pipelines.studies.sharing.build", lambda recipe: [replace(step, run=fake) for step in dag.build(recipe)]
    )
    monkeypatch.setattr("pipelines.tracked.connect", lambda cluster: None)
    monkeypatch.setattr("pipelines.tracked.preflight", lambda *given, **named: None)
    monkeypatch.setattr("cluster.tracking.open_tracker", lambda *given: books)
    monkeypatch.setattr("cluster.tracking.attach", lambda uri, run_id: Attached(run_id, books.runs[int(run_id)]))
    return ran, books, broken


ASKED = ["ablation", "--recipe", "demo", "--seeds", "2", "--only", "no_pretraining", "mlm_only"]


def test_a_study_makes_what_runs_share_once_and_a_second_one_makes_nothing(
    quick, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    ran, books, _ = quick
    assert study.main([*ASKED, "--root", str(tmp_path)]) == 0
    once = dict.fromkeys(("corpus", "pairs", "clean", "base", "pack"), 1)
    assert {step: ran.count(step) for step in ran} == once | {"pretrain": 4, "finetune": 6, "evaluate": 6}
    assert "44 steps if taken singly, 21 together (48%): 0 of these are done, 21 to run" in capsys.readouterr().out

    folder = tmp_path / "studies" / "ablation"
    text = (folder / "report.md").read_text()
    full, none, mlm = (line.split("|") for line in text.splitlines()[4:7])
    assert [cell.strip() for cell in full[1:5]] == ["full", "2", "91.0", "1.4"]  # 45 and 46 of 50
    assert [cell.strip() for cell in none[1:5]] == ["no_pretraining", "2", "61.0", "1.4"]
    assert [cell.strip() for cell in none[5:8]] == ["-30.0 (-30.0 to -30.0)", "0.0002", "worse"]
    assert mlm[7].strip() == "not told apart" and (full[8].strip(), none[9].strip()) == ("0.002", "5e-06")
    said = json.loads((folder / "study.json").read_text())
    assert [(line["tokens"], line["flops"]) for line in said] == [(2000, 1e7), (1000, 5e6), (2000, 1e7)]
    assert (folder / "variants.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((folder / "runs").iterdir())) == 6 and not (tmp_path / "run.json").exists()

    names = [run["name"] for run in books.runs]
    assert names[:2] == ["ablation of demo", "full-seed0"] and books.runs[1]["parent"] == "ablation of demo"
    assert books.runs[1]["metrics"]["score"] == 0.9 and books.runs[0]["status"] == "FINISHED"
    assert {"report.md", "variants.png", "scores.csv", "losses.png"} <= set(books.runs[0]["artifacts"])
    family = runs("ablation", 2)
    losses = losses_of(family, {run.name: plan_of(run, str(tmp_path)) for run in family})
    assert list(losses) == ["pretrain: mlm, held out", "finetune: contrastive"]
    assert losses["pretrain: mlm, held out"] == dict.fromkeys(("full", "mlm_only"), [[(1000, 3.5)]] * 2)
    assert losses["finetune: contrastive"]["no_pretraining"] == [[(500, 2.0), (1000, 1.0)]] * 2

    ran.clear()
    assert study.main([*ASKED, "--root", str(tmp_path)]) == 0
    assert ran == [] and (folder / "report.md").read_text().split("By chance")[0] == text.split("By chance")[0]
    assert study.main([*ASKED, "--seeds", "3", "--root", str(tmp_path)]) == 0
    assert sorted(ran) == ["evaluate"] * 3 + ["finetune"] * 3 + ["pretrain"] * 2

    ran.clear()
    assert study.main([*ASKED, "--report", "--metric", "ndcg_at_10", "--root", str(tmp_path)]) == 0
    text = (folder / "report.md").read_text()
    assert ran == [] and text.startswith("Scores: ndcg_at_10") and "By chance" not in text
    assert text.splitlines()[4].split("|")[3].strip() == "95.5"


def test_a_run_that_fails_is_reported_and_the_others_go_on(
    quick, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    ran, books, broken = quick
    broken.add("pretrain")
    assert study.main([*ASKED, "--root", str(tmp_path)]) == 1
    assert ran.count("pretrain") == 4 and ran.count("evaluate") == 4
    report = (tmp_path / "studies" / "ablation" / "report.md").read_text()
    assert "Failed: mlm_only-seed1: step pretrain failed: the loss is nan" in report and "| full" in report
    assert books.runs[0]["status"] == "FAILED"
    broken.clear()
    ran.clear()
    (tmp_path / "studies" / "ablation" / "report.md").unlink()
    assert study.main([*ASKED, "--report", "--root", str(tmp_path)]) == 0 and ran == []
    report = (tmp_path / "studies" / "ablation" / "report.md").read_text()
    assert "| full" in report and "| mlm_only" not in report
    assert study.main([*ASKED, "--root", str(tmp_path)]) == 0 and sorted(set(ran)) == [
        "evaluate",
        "finetune",
        "pretrain",
    ]
    assert ran.count("pretrain") == 2 and "Failed" not in (tmp_path / "studies" / "ablation" / "report.md").read_text()


def test_of_runs_side_by_side_one_makes_what_they_share(quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three runs meet in fine-tuning; two of them had to wait for the corpus and the base model that the third one made."""
    ran, _, _ = quick
    meet = threading.Barrier(3, timeout=20)  # breaks unless three runs are inside at the same time
    asked: list[int] = []
    monkeypatch.setattr("pipelines.studies.running.connect", lambda cluster: None)
    for module in ("pipelines.tracked", "pipelines.studies.running"):
        monkeypatch.setattr(f"{module}.preflight", lambda *given, at_once, **named: asked.append(at_once))

    def slowly(recipe: Recipe) -> list[Step]:
        def finetune(context: Context) -> dict:
            meet.wait()
            return ready["finetune"].run(context)

        def base(context: Context) -> dict:
            time.sleep(0.3)
            return ready["base"].run(context)

        ready = {step.name: step for step in built(recipe)}
        changed = {"finetune": finetune, "base": base}
        return [replace(step, run=changed.get(name, step.run)) for name, step in ready.items()]

    built = studied.build
    monkeypatch.setattr(studied, "build", slowly)
    arguments = [word if word != "2" else "1" for word in ASKED]
    assert study.main([*arguments, "--at-once", "3", "--root", str(tmp_path)]) == 0
    once = dict.fromkeys(("corpus", "pairs", "clean", "base", "pack"), 1)
    assert {step: ran.count(step) for step in ran} == once | {"pretrain": 2, "finetune": 3, "evaluate": 3}
    assert asked == [3, 3, 3, 3]  # before any of them, and each for itself
    outcomes = [json.loads(file.read_text()) for file in (tmp_path / "studies" / "ablation" / "runs").iterdir()]
    corpus = [(a["status"], a["why"]) for o in outcomes for a in o["steps"] if a["step"] == "base"]
    assert sorted(corpus) == [("done", "never ran here")] + [("skipped", "made meanwhile by another run")] * 2


def test_no_room_for_so_many_is_said_before_any_of_them(
    quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    ran, books, _ = quick

    def refuse(*given, **named) -> None:
        raise NoRoom("the cluster has no room for this recipe: 3 x 1 GPU of 1")

    monkeypatch.setattr("pipelines.studies.running.connect", lambda cluster: None)
    monkeypatch.setattr("pipelines.studies.running.preflight", refuse)
    assert study.main([*ASKED, "--at-once", "3", "--root", str(tmp_path)]) == 2
    assert "3 x 1 GPU of 1" in capsys.readouterr().err
    assert ran == [] and [(run["name"], run["status"]) for run in books.runs] == [("ablation of demo", "FAILED")]


def test_the_family_is_printed_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert study.main(["scaling", "--seeds", "2", "--dry-run", "--root", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "pretrain.rows_per_step=4 pretrain.steps=100" in printed and "where the curve of steps begins" in printed
    assert "32 runs, 2 seed(s) of 16 variants: " in printed and not list(tmp_path.iterdir())
    assert study.main(["ablation", "--only", "mae", "--dry-run", "--root", str(tmp_path)]) == 2
    assert "--only mae: no such variant; there are full, no_pretraining, " in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        study.main(["--help"])
    assert ended.value.code == 0 and "ablation takes one part of the method away" in capsys.readouterr().out


def test_a_study_of_runs_that_full_py_made_is_not_a_second_root(tmp_path: Path) -> None:
    """What full.py leaves up to fine-tuning has the same fingerprints."""
    mine = {p.step.name: p.fingerprint for p in make_plan(dag.build(load_recipe("demo", [])), str(tmp_path))}
    theirs = {p.step.name: p.fingerprint for p in plan_of(runs("ablation", 1)[0], str(tmp_path))}
    assert {name for name in theirs if theirs[name] == mine[name]} == set(theirs) - {"evaluate"}


def test_pairs_of_ones_own_are_left_out_by_name(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    asked = ["ablation", "--dry-run", "--root", str(tmp_path), "--set", "finetune.exclude=[digit_to_name]"]
    assert study.main([*asked, "--without", "plots=text_*,plot?", "--only", "no_plots"]) == 0
    printed = capsys.readouterr().out
    assert "no_plots" in printed and "finetune.exclude=['digit_to_name', 'text_*', 'plot?']" in printed
    assert "6 runs, 3 seed(s) of 2 variants" in printed
    for wrong in ("plots", "=text_*", "plots=", "plots=a,,b"):
        assert study.main([*asked, "--without", wrong]) == 2
        assert f"--without {wrong!r}: NAME=PATTERN,... is expected" in capsys.readouterr().err
