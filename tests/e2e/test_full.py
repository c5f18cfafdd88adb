"""The whole system as a user runs it, held to what the README promises."""

import json
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.training.plan import hold_out, row_plan
from tests.e2e.conftest import KICAD, REJECTED, ROOT, broken_corpus, png

STEPS = ("corpus", "pairs", "clean", "base", "pack", "pretrain", "finetune", "evaluate", "export")


def record(finished, step: str) -> dict:
    return json.loads((finished.root / "latest" / step / "record.json").read_text())


def test_a_killed_worker_does_not_stop_the_run(finished):
    assert finished.run.killed, finished.run.output[-3000:]
    assert finished.run.code == 0, finished.run.output[-3000:]
    resumed = re.search(r"pretrain: resumed from the checkpoint of step (\d+)", finished.run.output)
    assert resumed and int(resumed[1]) in (4, 8)  # the newest of every 4 steps before the 10th; the last may be lost
    assert record(finished, "pretrain")["result"]["restarts"] == 1
    assert [step for step in STEPS if not (finished.root / "latest" / step / "record.json").exists()] == []


def test_broken_documents_are_counted_by_reason_and_kept_aside(finished):
    result = record(finished, "corpus")["result"]
    assert result["rejected"] == REJECTED and result["documents"] > 100
    aside = pq.read_table(finished.root / "latest" / "corpus" / "rejected").to_pylist()
    assert sorted(row["reason"] for row in aside) == sorted(REJECTED) and all(row["detail"] for row in aside)


def test_what_the_evaluation_tasks_hold_is_taken_out_and_counted(finished):
    result = record(finished, "clean")["result"]
    folder = finished.root / "latest" / "clean"
    dropped = [row for file in result["dropped"] for row in pq.read_table(folder / file).to_pylist()]
    assert Counter(row["reason"] for row in dropped) == result["counts"]
    if KICAD.exists():
        assert result["counts"]["image_in_evaluation"] == 63
    mixture = record(finished, "pack")["result"]["mixture"]
    packed = sum(share["documents"] for names in mixture.values() for share in names.values())
    whole = sum(row["segment"] == -1 for row in dropped)
    assert packed == record(finished, "corpus")["result"]["documents"] - whole
    assert "mixture " in (finished.root / "latest" / "pack" / "mixture.txt").read_text()


def test_packs_are_full_and_within_their_budget(finished):
    result = record(finished, "pack")["result"]
    lengths = [
        len(ids)
        for file, _ in result["files"]
        for ids in pq.read_table(finished.root / "latest" / "pack" / file)["input_ids"].to_pylist()
    ]
    assert max(lengths) <= 512 and sum(lengths) == result["tokens"] and result["fill"] >= 0.97


def test_scores_stand_beside_chance_and_every_stage(finished):
    result = record(finished, "evaluate")["result"]
    for name, row in result["scores"].items():
        assert list(row) == ["chance", "base", "pretrain", "finetune"] and all(
            0 <= value <= 1 for value in row.values()
        )
        assert all(result["ndcg_at_5"][name][m] >= row[m] - 1e-6 for m in row if m != "chance")  # one right answer each
    assert result["attention"] == {"base": "causal", "pretrain": "bidirectional", "finetune": "bidirectional"}
    assert "finetune" in (finished.root / "latest" / "evaluate" / "scores.md").read_text()


def test_losses_fall(finished):
    for step, name in (("base", "causal_lm"), ("pretrain", "mlm")):  # MAE: so few steps with so few images say nothing
        result = record(finished, step)["result"]
        assert result["last"][name] < result["first"][name], (step, result)
    assert {"mlm", "mae", "total"} == set(record(finished, "pretrain")["result"]["last"])


def test_mlflow_has_one_parent_and_a_run_per_step_with_what_matters(finished):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{finished.root}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "moca"]
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    first = min(parents, key=lambda run: run.info.start_time)
    children = {r.info.run_name: r for r in runs if r.data.tags.get("mlflow.parentRunId") == first.info.run_id}
    assert set(children) == set(STEPS) and all(run.info.status == "FINISHED" for run in children.values())
    metrics = children["pretrain"].data.metrics
    assert {"mlm", "mae", "total", "learning_rate", "tokens_per_s", "data_wait", "grad_norm"} <= set(metrics)
    assert children["pretrain"].data.params["mlm_ratio"] == "0.4"
    assert {"contrastive", "accuracy"} <= set(children["finetune"].data.metrics)
    (dataset,) = children["pretrain"].inputs.dataset_inputs
    assert dataset.dataset.digest == (finished.root / "latest" / "pack").resolve().name
    assert "losses.png" in [a.path for a in client.list_artifacts(children["pretrain"].info.run_id)]
    history = client.get_metric_history(children["pretrain"].info.run_id, "mlm")
    assert {0, 1, 3, 23} <= {point.step for point in history}
    drawn = [a.path for a in client.list_artifacts(children["pretrain"].info.run_id, "reconstructions")]
    assert [int(Path(path).stem.removeprefix("step_")) for path in sorted(drawn)] == [0, 3, 6, 12, 24]
    for step, name in (("pretrain", "time.png"), ("finetune", "similarities.png"), ("evaluate", "finetune.html")):
        assert name in [a.path for a in client.list_artifacts(children[step].info.run_id)], name
    assert "report.html" in [a.path for a in client.list_artifacts(first.info.run_id)]


def test_tokens_are_counted_exactly_though_a_worker_was_killed(finished):
    index = pq.read_table(finished.root / "latest" / "pack" / "index.parquet")
    kept, _ = hold_out(len(index), 0.05, 2, (0,))
    plan = row_plan(index["cost_flops"].to_numpy()[kept], 2, range(24), 0, 1, seed=0)
    expected = sum(index["tokens"][int(kept[address["row"]])].as_py() for address in plan)
    result = record(finished, "pretrain")["result"]
    history = json.loads((finished.root / "latest" / "pretrain" / "history.json").read_text())["history"]
    assert result["tokens_seen"] == history[-1]["tokens_seen"] == expected
    assert sum(result["time"].values()) == pytest.approx(1)


def test_the_report_shows_the_run(finished):
    html = (finished.root / "report.html").read_text()
    assert "The run finished." in html and "went on from a checkpoint: 1." in html and html.count("data:image/png") >= 8
    for step in STEPS:
        assert f'id="{step}"' in html


def test_registered_model_embeds_texts_and_images(finished, monkeypatch):
    import mlflow
    import pandas as pd

    from moca_core.embedder import Embedder
    from moca_core.types import Segment

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{finished.root}/mlflow.db")
    registered = record(finished, "export")["result"]["registered"]
    model = mlflow.pyfunc.load_model(f"models:/{registered['name']}@{registered['alias']}")
    picture = png(80, 50)
    rows = pd.DataFrame({"text": ["a schematic", None, "and a board"], "image": [None, picture, picture]})
    vectors = np.array(model.predict(rows))
    contents = [(Segment("a schematic"),), (Segment(image=picture),), (Segment(image=picture), Segment("and a board"))]
    expected = Embedder(str(finished.root / "latest" / "export" / "model"), device="cpu").encode(contents)
    assert np.allclose((vectors * expected).sum(1), 1, atol=1e-4)
    assert model.metadata.signature.outputs.to_dict()[0]["tensor-spec"]["shape"] == (-1, 64)


def test_the_exported_folder_embeds_text_images_and_both(finished, tmp_path):
    from sentence_transformers import SentenceTransformer

    folder = finished.root / "latest" / "export" / "model"
    (tmp_path / "figure.png").write_bytes(png(80, 50))
    command = [
        sys.executable,
        "pipelines/embed.py",
        "--model",
        str(folder),
        "a schematic",
        str(tmp_path / "figure.png"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours = np.array([json.loads(line)["vector"] for line in done.stdout.splitlines()])
    from PIL import Image

    theirs = SentenceTransformer(str(folder), device="cpu").encode(["a schematic", Image.open(tmp_path / "figure.png")])
    assert np.allclose((ours * theirs).sum(1), 1, atol=1e-4)
    card = (folder / "README.md").read_text()
    assert "chance" in card and "finetune" in card
    cosine = record(finished, "export")["result"]["cosine"]
    assert min(cosine.values()) > 0.9999 and set(cosine) == {"packed", "transformers", "sentence_transformers", "mteb"}


def test_embed_refuses_what_it_cannot_embed(finished, tmp_path, capsys):
    from pipelines.embed import main

    folder = str(finished.root / "latest" / "export" / "model")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "bytes.bin").write_bytes(b"\xff\xfe\x00\x80")
    for item, message in (
        (str(tmp_path / "text.png"), "not_an_image"),
        (str(tmp_path / "none.png"), "no such file"),
        (str(tmp_path / "bytes.bin"), "neither an image"),
        ("  ", "empty"),
    ):
        assert main(["--model", folder, item]) == 2
        assert message in capsys.readouterr().err
    assert main(["--model", str(tmp_path), "a text"]) == 2
    assert "no config.json" in capsys.readouterr().err


def test_a_second_run_skips_every_step_and_says_why(finished, command):
    started = time.perf_counter()
    again = command("--recipe", str(finished.recipe), "--root", str(finished.root))
    assert again.code == 0 and time.perf_counter() - started < 60, again.output
    for step in STEPS:
        assert re.search(rf"{step} +skipped \(unchanged since", again.output), again.output
    assert "started" not in again.output


def test_another_mask_ratio_would_run_pretraining_and_what_follows_alone(finished, command):
    arguments = ["--recipe", str(finished.recipe), "--root", str(finished.root), "--set", "pretrain.mlm_ratio=0.3"]
    plan = command(*arguments, "--dry-run").output
    verdicts = {words[1]: words[0] for words in map(str.split, plan.splitlines()) if words[0] in ("run", "skip")}
    assert verdicts == {s: "skip" if s in ("corpus", "pairs", "clean", "base", "pack") else "run" for s in STEPS}
    assert "mlm_ratio: 0.4 -> 0.3" in plan and "pretrain changed" in plan


def test_the_cause_of_a_failing_data_task_reaches_the_user(ray_session, command, tmp_path):
    pq.write_table(pq.ParquetFile(_other_layout(tmp_path)).read(), tmp_path / "documents.parquet")
    source = f"corpus.sources=[{{layout: obelics, path: {tmp_path}/documents.parquet}}]"
    stopped = command("--until", "corpus", "--root", str(tmp_path / "root"), "--set", source)
    assert stopped.code == 1
    assert re.search(
        r"error: step corpus failed: .*documents.parquet: no column texts for 'texts'; it has text, images",
        stopped.output,
    )
    assert not list((tmp_path / "root" / "corpus").glob("*/record.json"))


def _other_layout(folder) -> str:
    broken_corpus(folder / "moca")
    return str(folder / "moca" / "part.parquet")


def test_what_can_never_run_is_refused_before_the_first_step(ray_session, command, tmp_path):
    done = command("--set", "cluster.cpus_per_worker=300", "--root", str(tmp_path))
    assert done.code == 2
    assert "the cluster has no room for this recipe:\n  NO pretrain  2 worker(s) of 300 CPU" in done.output
    assert not [*tmp_path.glob("corpus/*")]
    outcome = json.loads((tmp_path / "run.json").read_text())
    assert outcome["status"] == "FAILED" and "300 CPU" in outcome["error"]
