"""The paper's recipes: its numbers, and where they run."""

import math

import pytest

from pipelines.full import main
from pipelines.recipe import load_recipe


@pytest.mark.parametrize(("name", "ratio_text", "ratio_image"), [("moca_3b", 0.4, 0.5), ("moca_7b", 0.6, 0.6)])
def test_the_papers_numbers(name: str, ratio_text: float, ratio_image: float) -> None:
    recipe = load_recipe(name, [])
    pretrain, finetune = recipe.pretrain, recipe.finetune
    assert (pretrain.mlm_ratio, pretrain.mae_ratio, pretrain.mae_weight) == (ratio_text, ratio_image, 0.5)
    assert (pretrain.learning_rate, pretrain.steps, recipe.pack.max_tokens) == (2e-6, 3311, 2048)
    assert (finetune.learning_rate, finetune.batch_size, finetune.num_negatives) == (1e-5, 2048, 2)
    assert math.isclose(finetune.loss.temperature, 0.03)
    assert (recipe.base.min_image_px, recipe.base.max_image_px) == (256 * 784, 1024 * 784)
    assert recipe.base.on_hub() and name[-2:].upper() in recipe.base.model


@pytest.mark.parametrize("workers", [8, 16, 32, 64])
def test_the_papers_recipes_run_on_nodes_of_eight_gpus(workers: int) -> None:
    assert load_recipe("moca_3b", [f"cluster.num_workers={workers}"]).cluster.num_workers == workers


def test_more_workers_than_rows_of_a_step_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rows_per_step=64 .*num_workers=96"):
        load_recipe("moca_3b", ["cluster.num_workers=96"])


def test_a_placeholder_for_a_bucket_is_an_error_before_anything_runs(
    s3: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert main(["--recipe", "moca_3b", "--root", "s3://YOUR-BUCKET/runs", "--dry-run"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and "bucket" in printed.err.lower()
    assert "plan for" not in printed.out
