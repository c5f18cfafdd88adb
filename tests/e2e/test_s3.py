"""The whole pipeline with its root on S3 (moto on loopback): every artifact, checkpoint and model goes through the bucket."""

import json
import os

import pytest

from cluster import storage
from tests.e2e.conftest import pipeline, recipe_file


@pytest.mark.slow
def test_the_pipeline_runs_on_s3_and_skips_there(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("MOCA_CACHE", str(tmp_path / "cache"))
    bucket = storage.join(s3, "runs")
    recipe = str(recipe_file(tmp_path))
    database = f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"
    arguments = ["--recipe", recipe, "--root", bucket, "--set", database, "--set", "pretrain.steps=6"]
    first = pipeline(*arguments)
    assert first.code == 0, first.output[-3000:]
    written = [path for path, _ in storage.list_files(bucket)]
    assert any(path.startswith("export/") and path.endswith("model/model.safetensors") for path in written)
    assert not any(
        "/checkpoints/" in path and path.endswith(".pt") for path in written
    )  # cleared once the model is there
    (record,) = [path for path in written if path.startswith("export/") and path.endswith("record.json")]
    assert min(json.loads(storage.read_bytes(storage.join(bucket, record)))["result"]["cosine"].values()) > 0.9999
    again = pipeline(*arguments)
    assert again.code == 0 and again.output.count("skipped (unchanged since") == 9
    refused = pipeline("--recipe", recipe, "--root", bucket)
    assert refused.code == 2 and "MLflow needs a server" in refused.output
    assert "MLFLOW_TRACKING_URI" not in os.environ
