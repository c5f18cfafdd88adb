"""A driver that dies in the middle of a data step: what it finished stays, and the artifacts are the same to the bit."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.pipelines.conftest import files_of, write_pairs, write_web

ROOT = Path(__file__).parents[2]


def write_recipe(folder: Path) -> Path:
    """Of many units: 40 files of documents, and windows of few."""
    write_web(folder / "web", 40)
    write_pairs(folder / "pairs")
    tiny = {"text_hidden": 32, "text_layers": 1, "text_heads": 2, "text_kv_heads": 1, "text_intermediate": 32}
    tiny |= {"vision_hidden": 32, "vision_layers": 1, "vision_heads": 2, "vision_intermediate": 32, "vocab_size": 600}
    recipe = {
        "recipe": "demo",
        "corpus": {"sources": [{"layout": "obelics", "path": str(folder / "web")}]},
        "pairs": {
            "train": [{"layout": "triplets", "path": str(folder / "pairs" / "train")}],
            "evaluate": [{"layout": "mmeb", "path": str(folder / "pairs" / "evaluate")}],
        },
        "clean": {"max_image_copies": 5},
        "base": {"tiny": {**tiny, "max_image_px": 112 * 112}, "steps": 1, "max_tokens": 128},
        "pack": {"max_tokens": 96, "window": 10},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def start(recipe: Path, root: Path) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MOCA_", "MLFLOW_"))}
    command = [sys.executable, "pipelines/full.py", "--recipe", str(recipe), "--root", str(root), "--until", "pack"]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def kill_when(process: subprocess.Popen, root: Path, files: str, count: int) -> str:
    """A SIGKILL to the driver as soon as so many files are there; what it said before. Its workers end by themselves."""
    deadline = time.monotonic() + 240
    while len(list(root.glob(files))) < count:
        assert process.poll() is None, process.stdout.read()[-3000:]
        assert time.monotonic() < deadline, f"never {count} of {files}"
        time.sleep(0.002)
    process.kill()
    return process.communicate()[0]


@pytest.mark.slow
def test_a_driver_killed_in_corpus_and_in_pack_leaves_the_same_artifacts(tmp_path: Path) -> None:
    recipe, root, quiet = write_recipe(tmp_path), tmp_path / "root", tmp_path / "quiet"
    kill_when(start(recipe, root), root, "corpus/*/state/results/*.parquet", 5)
    second = kill_when(start(recipe, root), root, "pack/*/state/results/*.parquet", 5)
    assert re.search(r"corpus +\d+ of 40 units were finished before", second)
    assert len(list(root.glob("corpus/*/record.json"))) == 1 and not list(root.glob("pack/*/record.json"))
    last = start(recipe, root)
    output = last.communicate(timeout=300)[0]
    assert last.returncode == 0, output[-3000:]
    finished = re.search(r"pack +(\d+) of (\d+) units were finished before", output)
    assert finished and 5 <= int(finished[1]) < int(finished[2]) == len(list(root.glob("pack/*/rows/*.parquet")))
    assert "corpus    skipped" in output and (root / "latest" / "corpus").exists()
    undisturbed = start(recipe, quiet)
    output = undisturbed.communicate(timeout=300)[0]
    assert undisturbed.returncode == 0 and "finished before" not in output, output[-3000:]
    for step, kept in (
        ("corpus", ("documents", "keys", "rejected", "groups.parquet")),
        ("pairs", ("train", "tasks", "evaluation", "rejected")),
        ("clean", ("dropped",)),
        ("pack", ("rows", "index.parquet", "mixture.txt")),
    ):
        ours, theirs = (files_of(str((folder / "latest" / step).resolve()), *kept) for folder in (root, quiet))
        assert ours.keys() == theirs.keys() and len(ours) >= len(kept) - 1
        assert [name for name in ours if ours[name] != theirs[name]] == []
        records = [json.loads((folder / "latest" / step / "record.json").read_text()) for folder in (root, quiet)]
        assert records[0]["result"] == records[1]["result"]
