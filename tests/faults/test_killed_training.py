"""A worker, the driver and a node killed in the middle of training: the study of benchmarks/kill_study.py, short, and what it judges by."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

ROOT = Path(__file__).parents[2]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import watched_command

    return watched_command


def test_one_bit_of_one_weight_makes_another_digest(watched, tmp_path: Path) -> None:
    weights = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones(2, dtype=np.float32)}
    digests = set()
    for name, changed in (
        ("same", weights),
        ("again", dict(reversed(weights.items()))),
        ("bit", weights | {"a": np.array([1, np.nextafter(np.float32(1), np.float32(2))])}),
        ("shape", weights | {"b": weights["b"].reshape(3, 2)}),
        ("name", {"c": weights["a"], "b": weights["b"]}),
        ("fewer", {"b": weights["b"]}),
    ):
        (tmp_path / name).mkdir()
        save_file(changed, tmp_path / name / "model.safetensors")
        digests.add(watched.digest(tmp_path / name))
        assert len(digests) == 1 or name != "again"
    assert len(digests) == 5


def test_lines_say_how_far_training_is(watched) -> None:
    lines = (
        "[  15.4 s] pretrain  started (never ran here)",
        "(RayTrainWorker pid=1) pretrain [###.................]  6/40  mlm 7.162",
        "(RayTrainWorker pid=1) pretrain: resumed from the checkpoint of step 4",
        "[  50.5 s] pretrain  writing the model",
        "[  15.4 s] finetune  started (never ran here)",
    )
    places = [watched.place_of(line) for line in lines]
    assert places == [(0, 0), (0, 6), None, (0, watched.WRITING), (1, 0)]
    assert sorted(filter(None, places)) == [place for place in places if place]


@pytest.mark.slow
def test_a_killed_worker_driver_and_node_change_no_weight(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/kill_study.py", "--runs", "3", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    killed = [re.match(r" +(\d) +(worker|driver|node)", line) for line in done.stdout.splitlines()]
    assert [found.groups() for found in killed if found] == [("1", "worker"), ("2", "driver"), ("3", "node")]
    rows = [json.loads((tmp_path / f"{number}.json").read_text()) for number in (1, 2, 3)]
    assert all(row["weights"] == "equal" and row["rows"] == "each once" for row in rows)
    assert "PASS: 3 of 3" in done.stdout
