"""The recipes in docs/ read the real corpus: pairs made of its sections, without labels, and what is held out of them."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from moca_core.sources import DOCUMENTS, PAIRS, TASKS
from pipelines.recipe import load_recipe

ROOT = Path(__file__).parents[2]
KICAD = ROOT.parent / "shared" / "data" / "kicad"
pytestmark = pytest.mark.skipif(not KICAD.exists(), reason="the KiCad corpus is not beside the repository")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder as the recipe expects it: the corpus beside it, the sections in its runs/."""
    work = tmp_path_factory.mktemp("work") / "repository"
    work.mkdir()
    (work.parent / "shared" / "data").mkdir(parents=True)
    (work.parent / "shared" / "data" / "kicad").symlink_to(KICAD)
    command = [sys.executable, str(ROOT / "docs" / "recipes" / "kicad_sections.py")]
    command += ["--corpus", "../shared/data/kicad/interleaved", "--out", "runs/kicad-sections"]
    subprocess.run(command, cwd=work, check=True)
    return work


def test_the_recipe_reads_all_of_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    recipe = load_recipe(str(ROOT / "docs" / "recipes" / "kicad_study.yaml"), [])
    counted = {}
    for kind, read, given in (
        (DOCUMENTS, "read_unit", recipe.corpus.sources),
        (PAIRS, "read_pairs", recipe.pairs.train),
    ):
        for source in given:
            adapter, location = source.adapter(kind), source.location()
            rows = [row for unit in adapter.list_units(location) for row in getattr(adapter, read)(location, unit)]
            counted[source.name] = len(rows)
    assert counted == {
        "obelics kicad-sections/corpus": 405,
        "mmeb kicad/mmeb_train.parquet": 494,
        "jsonl kicad-sections/pairs": 279 + 264,
    }
    tasks = [task for source in recipe.pairs.evaluate for task in source.adapter(TASKS).read_tasks(source.location())]
    assert sorted(len(task.queries) for task in tasks) == [61, 110, 140]


def test_held_out_sections_are_in_the_task_alone(folder: Path) -> None:
    made = folder / "runs" / "kicad-sections"
    corpus = pq.read_table(made / "corpus" / "part-0.parquet")
    lines = [
        json.loads(line)
        for line in (made / "tasks" / "sentence_to_section" / "candidates.jsonl").read_text().splitlines()
    ]
    assert not set(corpus["doc_id"].to_pylist()) & {line["id"] for line in lines}
    seen = " ".join(" ".join(filter(None, texts)) for texts in corpus["texts"].to_pylist())
    trained = (made / "pairs" / "sentence_to_section.jsonl").read_text()
    seen = " ".join(seen.split())
    told = [
        line for line in lines if line["content"] in seen or json.dumps(line["content"], ensure_ascii=False) in trained
    ]
    assert len(told) <= 2, [line["id"] for line in told]  # manuals repeat themselves


def test_held_out_figures_are_in_the_task_alone(folder: Path) -> None:
    made = folder / "runs" / "kicad-sections"
    encoded = {
        i for images in pq.read_table(made / "corpus" / "part-0.parquet")["images"].to_pylist() for i in images if i
    }
    trained = {np.asarray(Image.open(io.BytesIO(image)).convert("RGB")).tobytes() for image in encoded}
    task = made / "tasks" / "detail_to_figure"
    figures = {
        line["id"]: task / line["content"]["image"] for line in map(json.loads, (task / "candidates.jsonl").open())
    }
    for query in map(json.loads, (task / "queries.jsonl").open()):
        figure, detail = (
            np.asarray(Image.open(path)) for path in (figures[query["answers"][0]], task / query["query"]["image"])
        )
        assert figure.tobytes() not in trained
        assert all(0.35 < d / f < 0.75 for d, f in zip(detail.shape[:2], figure.shape[:2], strict=True))
    assert len(figures) == 110
