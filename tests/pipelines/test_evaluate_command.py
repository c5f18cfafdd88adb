"""The command `evaluate.py`: what it writes, what it says, what it uses again, and what it refuses."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from cluster.batch import Pool
from moca_core.benchmarks import Prompts
from moca_core.data.image_files import ImageBounds
from moca_core.types import EvalTask, Query
from pipelines import evaluate
from pipelines.evaluation import by_mteb, engine, report
from pipelines.evaluation.prepare import by_task
from pipelines.evaluation.tasks import write_task
from pipelines.sources import Source
from pipelines.tables import read_table
from tests.core.samples import image, png, text, words
from tests.pipelines.conftest import units_here
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of the same name in two folders; a set of one's own, a BEIR folder, an MMEB folder, and what a pipeline held out."""
    root = tmp_path_factory.mktemp("given")
    for name in ("a", "b"):
        tiny_model(root / name / "model", "qwen2_5_vl")
    weights = root / "b" / "model" / "model.safetensors"
    save_file({k: w.flip(0) for k, w in load_file(weights).items()}, weights, metadata={"format": "pt"})
    answers = [{"id": f"c{n}", "content": f"{n} {words(5, n)}"} for n in range(12)]
    queries = [{"query": f"which {n} {words(4, n)}", "answers": [f"c{n}"]} for n in range(12)]
    own, beir, mmeb = root / "own" / "boards", root / "beir" / "esg_reports_v2", root / "mmeb" / "ImageNet-1K"
    for folder in (own, beir / "qrels", mmeb, root / "images"):
        folder.mkdir(parents=True)
    (own / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    (own / "candidates.jsonl").write_text("\n".join(map(json.dumps, answers)))
    pages = [{"_id": f"p{n}", "image": f"{n}.png"} for n in range(5)]
    for n in range(5):
        (root / "images" / f"{n}.png").write_bytes(png(60, 60, n))
        (beir / f"{n}.png").write_bytes(png(60, 60, n))
    (beir / "corpus.jsonl").write_text("\n".join(map(json.dumps, pages)))
    asked = [{"_id": f"q{n}", "text": f"page {n}?"} for n in range(5)]
    (beir / "queries.jsonl").write_text("\n".join(map(json.dumps, asked)))
    (beir / "qrels" / "test.tsv").write_text("".join(f"q{n}\tp{n}\t{1 + n % 2}\n" for n in range(5)))
    rows = {
        "qry_text": ["<|image_1|>\nWhat is it?"] * 4,
        "qry_img_path": [f"{n}.png" for n in range(4)],
        "tgt_text": [[f"class {n}", *(f"class {m}" for m in range(6) if m != n)] for n in range(4)],
        "tgt_img_path": [[""] * 6] * 4,
    }
    pq.write_table(pa.table(rows), mmeb / "test.parquet")
    queries = tuple(Query((text(f"{n} {words(3, n)}"),), (n,)) for n in range(4))
    held_out = EvalTask("deep/task", queries, tuple((image(56, 56, n),) for n in range(4)))
    write_task(held_out, str(root / "pairs" / "tasks" / "deep" / "task"), ImageBounds())
    return root


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "run_units", units_here)
    monkeypatch.setattr(engine, "run_tasks", lambda fn, items, **_: [fn(*item) for item in items])
    monkeypatch.setattr(evaluate, "connect", lambda _: None)
    monkeypatch.setattr(Pool, "of_all", lambda _: Pool(1, 1, 0))


def command(given: Path, out: Path, *more: str, models: tuple[str, ...] = ("a", "b")) -> int:
    tasks = [f"jsonl={given}/own", f"beir={given}/beir", f"mmeb={given}/mmeb", f"stored={given}/pairs"]
    paths = [f"{given}/{model}/model" for model in models]
    return evaluate.main(
        [
            "--model",
            *paths,
            "--out",
            str(out),
            "--images",
            f"{given}/images",
            "--max-tokens",
            "128",
            "--tasks",
            *tasks,
            *more,
        ]
    )


def test_two_models_on_tasks_of_every_kind(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(given, tmp_path) == 0
    said = capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert list(scores["models"]) == ["a-model", "b-model"]
    metrics = {name: task["metric"] for name, task in scores["tasks"].items()}
    assert metrics == {
        "deep/task": "precision_at_1",
        "boards": "precision_at_1",
        "ViDoRe_esg_reports_v2_multilingual": "ndcg_at_5",
        "ImageNet-1K": "precision_at_1",
    }
    assert (
        scores["tasks"]["ViDoRe_esg_reports_v2_multilingual"]["prompts"]["image"]
        == "\nRepresent the given document image."
    )
    assert scores["settings"]["max_tokens"] == 128 and scores["models"]["a-model"]["attention"] == "causal"
    assert scores["compared"] == ["b-model", "a-model"] and set(scores["comparison"]) == {*metrics, "all"}
    assert len(read_table(str(tmp_path / "rankings" / "a-model" / "boards.parquet"))) == 12
    assert (tmp_path / "report.md").read_text() in said and (tmp_path / "scores.csv").exists()
    assert "| MMEB" not in said and "## MMEB: means over tasks" in said and "all (1 of 36 tasks)" in said
    assert "embedding: 0 contents" not in said

    before = (tmp_path / "report.md").read_text()
    assert command(given, tmp_path) == 0
    said = capsys.readouterr().out
    assert "tasks: 0 of 3 source(s) to read" in said and "embedding: 0 contents in 0 unit(s)" in said
    assert (tmp_path / "report.md").read_text() == before


def test_prompts_of_a_file_are_for_all_tasks(given: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.yaml").write_text('query: "Find: "\nimage: "\\nRead it."\n')
    assert command(given, tmp_path / "out", "--prompts", str(tmp_path / "prompts.yaml"), models=("a",)) == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert {json.dumps(task["prompts"]) for task in scores["tasks"].values()} == {
        '{"query": "Find: ", "image": "\\nRead it."}'
    }
    assert not scores["comparison"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "mydata"], "LAYOUT=PATH or mteb:NAME is needed"),
        (["--tasks", "nothing=x"], "unknown layout 'nothing'; use one of beir, builtin, jsonl"),
        (["--tasks", "stored=ROOT/own"], "no queries.parquet below it"),
        (
            ["--tasks", "jsonl=ROOT/beir"],
            "no folder with queries.jsonl and candidates.jsonl|no queries.jsonl or candidates",
        ),
        (["--tasks", "stored=ROOT/pairs", "stored=ROOT/pairs"], "two tasks are called deep/task"),
        (["--tasks", "mteb:Vidore2BioMedicalLecturesRetreival"], "Did you mean: 'Vidore2BioMedicalLecturesRetrieval'"),
        (["--tasks", "stored=ROOT/pairs", "--prompts", "mocca"], "--prompts 'mocca': one of none, moca"),
        (["--tasks", "stored=ROOT/pairs", "--prompts", "ROOT/broken.yaml"], "broken.yaml: while "),
        (["--tasks", "stored=ROOT/pairs", "--model", "ROOT/own"], "no config.json there"),
        (["--tasks", "stored=ROOT/pairs", "--model", "x=ROOT/a/model", "x=ROOT/b/model"], "two of one name"),
        (["--tasks", "stored=ROOT/pairs", "--max-tokens", "20"], "max_tokens=20 cannot hold one image"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    given: Path, tmp_path: Path, capsys, arguments: list[str], message: str
) -> None:
    (given / "broken.yaml").write_text("query: [a")
    arguments = [argument.replace("ROOT", str(given)) for argument in arguments]
    model = [] if "--model" in arguments else ["--model", f"{given}/a/model"]
    assert evaluate.main([*model, "--out", str(tmp_path), *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_models_are_called_after_what_tells_them_apart() -> None:
    assert evaluate.named_models(["runs/a/export/model", "runs/b/export/model"]) == {
        "a-export-model": "runs/a/export/model",
        "b-export-model": "runs/b/export/model",
    }
    assert evaluate.named_models(["new=x/model", "x/model/"]) == {"new": "x/model", "model": "x/model"}


def test_tasks_of_mteb_are_run_once(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """A task of ours under mteb's name, as there is nothing to download here; without it the error says what is missing."""
    import mteb

    from tests.mteb_tasks import as_mteb_task

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    name, run = "Vidore2BioMedicalLecturesRetrieval", []
    model = ["--model", f"{given}/a/model", "--out", str(tmp_path), "--max-tokens", "128"]

    class Unreachable:
        metadata = mteb.get_task(name).metadata

        def load_data(self) -> None:
            raise ConnectionError("Couldn't reach 'vidore/biomedical_lectures_v2' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(mteb, "get_task", lambda _: Unreachable())
    assert evaluate.main([*model, "--tasks", f"mteb:{name}"]) == 1
    assert "its data (vidore/biomedical_lectures_v2) is neither in the cache of Hugging Face" in capsys.readouterr().err

    queries = tuple(Query((text(f"{n} {words(3, n)}"),), (n,)) for n in range(5))
    task = as_mteb_task(EvalTask("local", queries, tuple((image(56, 56, n),) for n in range(5))))
    load = task.load_data
    task.load_data = lambda **options: (run.append(1), load(**options))
    monkeypatch.setattr(mteb, "get_task", lambda _: task)
    assert evaluate.main([*model, "--tasks", f"mteb:{name}"]) == 0 and run
    scores = json.loads((tmp_path / "scores.json").read_text())["mteb"]["tasks"]["LocalLocal"]
    assert scores["metric"] == "ndcg_at_5" and 0 <= scores["scores"]["model"] <= 1
    assert f"model,LocalLocal,mteb,,ndcg_at_5,{scores['scores']['model']}," in (tmp_path / "scores.csv").read_text()
    assert json.loads((tmp_path / scores["results"]["model"]).read_text())["score"] == scores["scores"]["model"]
    run.clear()
    assert evaluate.main([*model, "--tasks", f"mteb:{name}"]) == 0 and not run
    assert "mteb: 0 of 1 task(s) to run" in capsys.readouterr().out


def test_a_folder_of_a_benchmark_s_tasks_is_shared_out(tmp_path: Path) -> None:
    for name in ("ImageNet-1K", "GQA", ".cache"):
        (tmp_path / "mmeb" / name).mkdir(parents=True)
    source = Source("mmeb", str(tmp_path / "mmeb"), images=str(tmp_path))
    assert [one.path.rsplit("/", 1)[1] for one in by_task(source)] == ["GQA", "ImageNet-1K"]
    assert all(one.images == source.images for one in by_task(source))
    whole = replace(source, images=None)  # images may lie beside the files or at the top
    assert by_task(whole) == [whole]
    (tmp_path / "mmeb" / "something").mkdir()
    assert by_task(source) == [source]


def test_a_benchmark_of_mteb_is_its_public_tasks() -> None:
    assert len(by_mteb.task_names(["ViDoRe(v2)"])) == 4 and len(by_mteb.task_names(["ViDoRe(v1)"])) == 10
    three = by_mteb.task_names(["ViDoRe(v3)", "Vidore3HrRetrieval"])
    assert len(three) == 8 == len(set(three))


def test_prompts_by_name_and_tables() -> None:
    assert evaluate.read_prompts(None) is None and evaluate.read_prompts("none") == Prompts()
    assert report.table(["a", "b"], [["x", "1.0"]]) == "| a |   b |\n|---|----:|\n| x | 1.0 |\n"
