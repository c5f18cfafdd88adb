"""Recipes and the only ways to change them: every refusal names the key, the value and what would be right."""

import pytest

from moca_core.lora import Lora
from pipelines import full
from pipelines.dag import build
from pipelines.recipe import RECIPES, load_recipe, named_recipe
from pipelines.runner.fingerprint import canonical


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds(name):
    assert named_recipe(name).pretrain.mae_weight == 0.5  # the paper's w


def test_overrides_reach_their_field_with_the_field_s_type():
    recipe = load_recipe(
        "demo",
        [
            "pretrain.learning_rate=2e-6",
            "pretrain.shift=false",
            "base.tiny.text_layers=2",
            "finetune.weights={digit_to_name: 1}",
            "pretrain.freeze=[vision, merger]",
            "finetune.lora.rank=16",
            "finetune.lora.targets=[language.q_proj, vision]",
        ],
    )
    assert recipe.pretrain.learning_rate == 2e-6 and recipe.pretrain.shift is False
    assert recipe.base.tiny.text_layers == 2
    assert recipe.finetune.weights == {"digit_to_name": 1.0}
    assert recipe.pretrain.freeze == ("vision", "merger") and recipe.finetune.freeze == ()
    assert recipe.finetune.lora == Lora(rank=16, targets=("language.q_proj", "vision"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pretrain.mlm_ration=0.3", r"pretrain.mlm_ration=0.3: no such setting; did you mean mlm_ratio\?"),
        ("pretrian.mlm_ratio=0.3", r"no such setting; did you mean pretrain\?"),
        ("pretrain.mlm_ratio=high", "pretrain.mlm_ratio='high' must be of type float"),
        ("pretrain.steps=1.5", "pretrain.steps=1.5 must be of type int"),
        ("pretrain.steps=true", "pretrain.steps=True must be of type int"),
        ("pretrain.shift=1", "pretrain.shift=1 must be of type bool"),
        ("pretrain.precision=fp8", "pretrain.precision='fp8' must be one of fp32, bf16"),
        ("pretrain.mlm_ratio=1.5", "mlm_ratio=1.5 must be at least 0 and below 1"),
        ("pretrain.mae_ratio=0", "mae_ratio=0.0 with mae_weight=0.5: both are 0"),
        ("pretrain.rows_per_step=1", "pretrain.rows_per_step=1 must be at least cluster.num_workers=2"),
        ("export.max_tokens=64", "export.max_tokens=64 must be at least finetune.max_tokens"),
        (
            "corpus.sources=[{layout: obelix, path: x}]",
            "unknown layout 'obelix'; use one of builtin, captions, markup, mmc4, moca",
        ),
        ("corpus.sources=[{layout: obelics}]", "every layout but 'builtin' needs a path"),
        ("corpus.sources=[{layout: obelics, pth: x}]", "no such setting; there are layout, path"),
        ("tracking.log_every_steps=0", "tracking.log_every_steps=0 must be at least 1"),
        ("corpus.bounds.max_px=999999999", "max_px=999999999 has no effect above"),
        (
            "pretrain.freeze=[visual]",
            r"pretrain.freeze\[0\]='visual' must be one of vision, merger, language, embeddings",
        ),
        ("finetune.freeze=[vision, merger, language, embeddings]", "names all parts: nothing of the model would be"),
        ("base.freeze=[vision]", "base.freeze=.* set pretrain.freeze or finetune.freeze"),
        ("finetune.lora.rank=-1", "lora.rank=-1 must be positive, or 0 for no adapters"),
        ("finetune.lora.targets=[q_proj]", "must name language, vision, merger, or layers such as 'language.q_proj'"),
        ("finetune.lora=16", "finetune.lora=16 must be a mapping with rank, alpha, targets"),
        ("pretrain.lora.rank=16", "pretrain.lora={'rank': 16}: no such setting"),
        ("cluster.zero_stage=4", "cluster.zero_stage=4 must be one of 0, 1, 2, 3"),
        ("cluster.offload_optimizer=nvme", "offload_optimizer 'nvme' needs zero_stage 3 or more, not 2"),
        ("mine.warmup_steps=50", "mine.warmup_steps=50 without mine.negatives"),
        ("mine.negatives=200", r"top_k=100 must be at least skip_top \+ negatives = 200"),
        ("mine.max_positive_share=95", "max_positive_share=95.0 must be above 0 and at most 1, or null"),
        ("mine.negatives=-1", "negatives=-1 must be at least 0"),
        ("finetune.exclude=[*_page]", r"'\[\*_page\]' is no YAML .* needs quotes of its own"),
        ("mlm_ratio=0.3", "stage.key=value is expected"),
        ("pretrain", "stage.key=value is expected"),
    ],
)
def test_wrong_settings_are_refused_before_anything_starts(override, message, capsys, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_recipe("demo", [override])
    assert full.main(["--recipe", "demo", "--set", override, "--root", str(tmp_path / "root")]) == 2
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "root").exists()


def test_adapters_and_frozen_parts_exclude_each_other():
    adapters = load_recipe("demo", ["finetune.lora={rank: 8, alpha: 16}"])
    assert adapters.finetune.lora == Lora(rank=8, alpha=16)
    with pytest.raises(
        ValueError, match=r"freeze=\['vision'\] with lora.rank=8: under adapters all of the model is frozen"
    ):
        load_recipe("demo", ["finetune.lora.rank=8", "finetune.freeze=[vision]"])
    off = load_recipe("demo", ["finetune.lora.rank=0", "finetune.lora.alpha=3"])
    assert canonical(off.finetune) == canonical(load_recipe("demo", []).finetune) != canonical(adapters.finetune)


def test_a_yaml_recipe_changes_the_one_it_starts_from(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("recipe: demo\npretrain: {mlm_ratio: 0.2}\ncorpus:\n  sources: [{layout: obelics, path: x}]\n")
    recipe = load_recipe(str(path), ["pretrain.mae_ratio=0.6"])
    assert (recipe.pretrain.mlm_ratio, recipe.pretrain.mae_ratio) == (0.2, 0.6)
    assert recipe.corpus.sources[0].layout == "obelics"
    assert recipe.finetune == load_recipe("demo", []).finetune
    path.write_text("- a list\n")
    with pytest.raises(ValueError, match="must hold sections"):
        load_recipe(str(path), [])
    with pytest.raises(ValueError, match="unknown recipe 'dmo'"):
        load_recipe("dmo", [])
    with pytest.raises(ValueError, match="does not exist"):
        load_recipe(str(tmp_path / "none.yaml"), [])


def test_dry_run_plans_and_runs_nothing(tmp_path, capsys):
    assert full.main(["--dry-run", "--root", str(tmp_path / "root")]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[:2] for line in printed.splitlines()[1:] if line.split()[0] != "needs"] == [
        ["run", name]
        for name in ("corpus", "pairs", "clean", "base", "pack", "pretrain", "finetune", "evaluate", "export")
    ]
    assert not (tmp_path / "root").exists()


def test_models_are_scored_in_the_order_of_training(tmp_path):
    """Whoever reads the scores takes the first as the beginning and the last as the model that is exported."""
    (step,) = [
        step for step in build(load_recipe("demo", ["evaluate.models=[finetune, base]"])) if step.name == "evaluate"
    ]
    assert step.config.models == ("base", "finetune") and step.needs == ("pairs", "base", "finetune")


def test_a_home_folder_is_meant_as_such(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (
        full.resolve_root("~/runs", "demo")
        == full.resolve_root(f"file://{tmp_path}/runs", "demo")
        == f"{tmp_path}/runs"
    )
    assert full.resolve_root("s3://bucket/runs", "demo") == "s3://bucket/runs"
    (tmp_path / "model").mkdir()
    assert load_recipe("demo", ["base.model=~/model"]).base.model == "~/model"
    with pytest.raises(ValueError, match="neither a folder"):
        load_recipe("demo", ["base.model=~/none"])
