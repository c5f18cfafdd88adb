"""The engine of evaluation against embedding everything at once and a loop over queries; nothing is embedded twice; kills."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from cluster.batch import Pool
from moca_core.benchmarks import PROMPTS, Prompts
from moca_core.data.image_files import ImageBounds
from moca_core.embedder import Embedder
from moca_core.metrics import ranking
from moca_core.types import Content, EvalTask, Query
from pipelines.evaluation import embedding, engine, report, scoring
from pipelines.evaluation.tasks import StoredTask, write_task
from pipelines.recipe import load_recipe
from pipelines.tables import read_table
from tests.core.samples import image, text, words
from tests.pipelines.conftest import units_here
from tests.tiny import tiny_model

POOL = Pool(1, 0.5, 0)


def texts(count: int, seed: int) -> tuple[Content, ...]:
    return tuple((text(f"{n} {words(4 + n % 5, seed + n)}"),) for n in range(count))


def made_up_tasks() -> dict[str, EvalTask]:
    """Texts that ask for texts, with grades; the same candidates and pages, in another order and asked of a few each."""
    rng = np.random.default_rng(0)
    answers, pages = texts(30, 100), tuple((image(60, 60, n),) for n in range(8))
    graded = tuple(
        Query(query, tuple(sorted(rng.choice(30, 3, replace=False).tolist())), grades=(1.0, 2.0, 3.0))
        for query in texts(20, 0)
    )
    mixed = (*pages, *answers[::-1])
    chosen = tuple(
        Query(query, (n,), tuple(rng.permutation([n, *(m for m in range(0, 38, 3) if m != n)]).tolist()))
        for n, query in enumerate((*texts(5, 0), *((image(60, 60, 50 + n), text("like this")) for n in range(5))))
    )
    return {"graded": EvalTask("graded", graded, answers), "sub/mixed": EvalTask("sub/mixed", chosen, mixed)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluation")
    tiny_model(root / "one", "qwen2_5_vl")
    tiny_model(root / "two", "qwen2_vl")
    for name, task in made_up_tasks().items():
        write_task(task, str(root / "tasks" / name), ImageBounds())
    return root


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in this process; other tests see to Ray. Small units, so that there are several."""
    monkeypatch.setattr(engine, "run_units", units_here)
    monkeypatch.setattr(engine, "run_tasks", lambda fn, items, **_: [fn(*item) for item in items])
    monkeypatch.setattr(embedding, "UNIT_CONTENTS", 7)


def evaluate(
    root: Path,
    out: Path,
    models: tuple[str, ...] = ("one",),
    tasks: tuple[str, ...] = ("graded", "sub/mixed"),
    **changes,
) -> engine.Evaluated:
    said = changes.pop("said", [])
    readers = engine.open_models({Path(m).name: str(root / m) for m in models}, changes.pop("max_tokens", 128), POOL)
    stored = [replace(StoredTask.of(name, str(root / "tasks" / name)), **changes) for name in tasks]
    uri, vectors_uri = str(out), str(out / "vectors")
    return engine.evaluate(readers, stored, uri=uri, vectors_uri=vectors_uri, pool=POOL, say=said.append)


def test_rankings_are_those_of_a_loop_over_queries(root: Path, here: None, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(scoring, "SCORES_BYTES", 4 * 38 * 6)  # blocks of six queries
    evaluated = evaluate(root, tmp_path, ("one", "two"))
    assert evaluated.rankings["two"]["sub/mixed"] == "rankings/two/sub/mixed.parquet"
    for model in ("one", "two"):
        embedder = Embedder(str(root / model), max_tokens=128)
        for name, task in made_up_tasks().items():
            table = read_table(str(tmp_path / evaluated.rankings[model][name]))
            assert table.schema.equals(scoring.RANKINGS)
            queries, candidates = embedder.encode([q.content for q in task.queries]), embedder.encode(task.candidates)
            for query, vector, row in zip(task.queries, queries, table.to_pylist(), strict=True):
                pool = list(query.candidates or range(len(candidates)))
                scores = candidates[pool] @ vector
                found = ranking(scores, [pool.index(p) for p in query.positives])
                assert row["precision_at_1"] == pytest.approx(found.precision_at_1())
                assert [row[f"ndcg_at_{k}"] for k in (5, 10)] == pytest.approx(
                    [found.ndcg(k, query.grades) for k in (5, 10)]
                )
                assert [row[f"recall_at_{k}"] for k in (1, 5, 10)] == pytest.approx(
                    [found.recall(k) for k in (1, 5, 10)]
                )
                assert row["right_rank"] == pytest.approx(found.right_rank())
                assert row["chance"] == len(query.positives) / len(pool)
                assert row["right_similarity"] == pytest.approx(
                    max(candidates[list(query.positives)] @ vector), abs=1e-5
                )
                assert len(row["top"]) == 10 and set(row["top"]) <= set(pool)
                assert row["similarity"] == pytest.approx(sorted(scores, reverse=True)[:10], abs=1e-5)
                assert row["similarity"] == pytest.approx(candidates[row["top"]] @ vector, abs=1e-5)


def test_nothing_is_embedded_twice(root: Path, here: None, tmp_path: Path) -> None:
    """Contents that tasks share once; a second run nothing; a copy of the model elsewhere nothing; other weights everything."""
    run = partial(evaluate, root, tmp_path)
    first = run(tasks=("graded",))
    assert first.embedded == 20 + 30
    both = run()
    assert both.embedded == 8 + 5  # pages, and queries with an image: the texts were there
    before = report.read_values(both, str(tmp_path))
    said: list[str] = []
    assert run(said=said).embedded == 0 and "embedding: 0 contents in 0 unit(s)" in said[0]

    shutil.copytree(root / "one", tmp_path / "elsewhere" / "one")
    (tmp_path / "elsewhere" / "one" / "README.md").write_text("a card")
    (tmp_path / "elsewhere" / "tasks").symlink_to(root / "tasks")
    moved = evaluate(tmp_path / "elsewhere", tmp_path)
    assert moved.embedded == 0
    again = report.read_values(moved, str(tmp_path))
    np.testing.assert_equal(again, before)

    weights = tmp_path / "elsewhere" / "one" / "model.safetensors"
    save_file({k: w * 1.01 for k, w in load_file(weights).items()}, weights, metadata={"format": "pt"})
    assert evaluate(tmp_path / "elsewhere", tmp_path).embedded == 63
    assert run(max_tokens=110).embedded == 63
    prompted = run(prompts=PROMPTS["moca"])
    assert prompted.embedded == 38  # other candidates; queries are asked as before
    asked = run(prompts=Prompts(query="Find: "))
    assert asked.embedded == 25 and run().embedded == 0


def test_prompts_reach_the_model(root: Path, here: None, tmp_path: Path) -> None:
    prompts = Prompts(query="Find: ", image="\nRead it.")
    plain, prompted = (
        read_table(str(tmp_path / d / evaluate(root, tmp_path / d, **given).rankings["one"]["sub/mixed"])).to_pylist()
        for d, given in (("a", {}), ("b", {"prompts": prompts}))
    )
    task, embedder = made_up_tasks()["sub/mixed"], Embedder(str(root / "one"), max_tokens=128)
    page, vector = embedder.encode(
        [(*task.candidates[2], text("\nRead it.")), (text("Find: " + task.queries[2].content[0].text),)]
    )
    assert prompted[2]["right_similarity"] == pytest.approx(page @ vector, abs=1e-5)
    assert prompted[2]["right_similarity"] != pytest.approx(plain[2]["right_similarity"], abs=1e-3)


class Collapsed:
    """All contents alike, or broken."""

    def __init__(self, value: float) -> None:
        self.value = value

    def encode(self, contents: list[Content]) -> np.ndarray:
        return np.full((len(contents), 16), self.value, dtype=np.float32)


def test_a_collapsed_model_scores_chance_and_a_broken_one_is_an_error(
    root: Path, here: None, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(embedding, "load_embedder", lambda *_: Collapsed(0.25))
    values = report.read_values(evaluate(root, tmp_path), str(tmp_path))["one"]
    for task in values.values():
        assert task["precision_at_1"] == pytest.approx(task["chance"])
    assert values["graded"]["recall_at_5"] == pytest.approx(np.full(20, 5 / 30))
    monkeypatch.setattr(embedding, "load_embedder", lambda *_: Collapsed(np.nan))
    with pytest.raises(ValueError, match="vectors of one for graded hold NaN or infinity"):
        evaluate(root, tmp_path / "broken")


def counted(made: Callable, log: Path, broken: Callable[[int], bool]) -> Callable:
    """Leaves a line for every unit, and fails for some; nested, so that Ray ships it by value."""
    log_file = str(log)

    def make(units, vectors_uri):
        real = made(units, vectors_uri)

        def unit(number: int) -> dict:
            if broken(number):
                raise OSError("no space left on device")
            result = real(number)
            with open(log_file, "a") as file:
                file.write(f"{result['embedded']}\n")
            return result

        return unit

    return make


def test_a_run_that_failed_goes_on(
    ray_session: None, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Ray: what the first attempt embedded is not embedded by the second, which ranks as if nothing had happened."""
    monkeypatch.setattr(embedding, "UNIT_CONTENTS", 7)
    made, logs = embedding.Embed, [tmp_path / name for name in ("first", "second")]
    monkeypatch.setattr(engine, "Embed", counted(made, logs[0], lambda number: number == 4))
    with pytest.raises(OSError, match="no space left"):
        evaluate(root, tmp_path / "out", ("one", "two"))
    monkeypatch.setattr(engine, "Embed", counted(made, logs[1], lambda number: False))
    evaluated = evaluate(root, tmp_path / "out", ("one", "two"))
    first, second = (sum(map(int, log.read_text().split())) for log in logs)
    assert first > 0 and second > 0 and first + second == 2 * 63
    monkeypatch.setattr(engine, "Embed", made)
    monkeypatch.setattr(engine, "run_units", units_here)
    whole = evaluate(root, tmp_path / "whole", ("one", "two"))
    a, b = (report.read_values(e, str(tmp_path / d)) for e, d in ((evaluated, "out"), (whole, "whole")))
    for model, task in ((m, t) for m in a for t in a[m]):
        assert a[model][task]["ndcg_at_5"] == pytest.approx(b[model][task]["ndcg_at_5"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"rankings", "vectors"}


def stored(name: str) -> StoredTask:
    return StoredTask.of(name, "nowhere")


def test_averages_are_means_over_tasks_and_say_what_is_missing() -> None:
    tasks = tuple(map(stored, ("ImageNet-1K", "N24News", "GQA", "ViDoRe_docvqa", "mine")))
    sizes = (10, 1000, 20, 30, 40)
    rng = np.random.default_rng(0)
    values = {
        "m": {
            t.name: {metric: rng.random(n) for metric in (*scoring.METRICS, "chance")}
            for t, n in zip(tasks, sizes, strict=True)
        }
    }
    means = {t.name: values["m"][t.name][t.metric].mean() for t in tasks}
    found = {(a.benchmark, a.name): a for a in report.averages(values, tasks)}
    assert [(key[1], a.tasks, a.of) for key, a in found.items() if key[0] == "MMEB"] == [
        ("Classification", 2, 10), ("VQA", 1, 10), ("IND", 2, 20), ("OOD", 1, 16), ("all", 3, 36),
    ]  # fmt: skip
    classes = (means["ImageNet-1K"] + means["N24News"]) / 2
    assert found["MMEB", "Classification"].scores["m"].mean == pytest.approx(classes)
    assert found["MMEB", "IND"].scores["m"].mean == pytest.approx(classes)
    assert found["MMEB", "all"].scores["m"].mean == pytest.approx((2 * classes + means["GQA"]) / 3)
    assert found["MMEB-V2 visdoc", "all"].scores["m"].mean == pytest.approx(
        values["m"]["ViDoRe_docvqa"]["ndcg_at_5"].mean()
    )
    assert stored("vidore_v3_hr").metric == "ndcg_at_10" and stored("ViDoRe_docvqa").prompts == PROMPTS["moca"]


def test_the_report_of_two_models(root: Path, here: None, tmp_path: Path) -> None:
    evaluated = evaluate(root, tmp_path, ("one", "two"))
    values = report.read_values(evaluated, str(tmp_path))
    compared = report.comparisons(values, evaluated.tasks, "two", "one")
    document = json.loads(json.dumps(report.document(values, evaluated, compared, ("two", "one")), allow_nan=False))
    graded = document["tasks"]["graded"]["scores"]["two"]["precision_at_1"]
    assert graded["mean"] == pytest.approx(values["two"]["graded"]["precision_at_1"].mean())
    assert graded["low"] <= graded["mean"] <= graded["high"]
    difference = document["comparison"]["all"]["difference"]["mean"]
    by_task = [
        values["two"][t]["precision_at_1"].mean() - values["one"][t]["precision_at_1"].mean() for t in values["one"]
    ]
    assert difference == pytest.approx(np.mean(by_task)) and 0 < document["comparison"]["all"]["p_value"] <= 1
    said = report.markdown(document)
    assert "| graded " in said and "## two against one, on the same queries" in said and "| all " in said
    lines = report.scores_csv(document).decode().splitlines()
    assert len(lines) == 1 + 2 * 2 * len(scoring.METRICS) and lines[1].startswith("one,graded,,,precision_at_1,")


def test_everything_on_s3(root: Path, here: None, s3: str, tmp_path: Path) -> None:
    for name, task in made_up_tasks().items():
        write_task(task, f"{s3}/tasks/{name}", ImageBounds())
    readers = engine.open_models({"one": str(root / "one")}, 128, POOL)
    stored = [StoredTask.of(name, f"{s3}/tasks/{name}") for name in made_up_tasks()]
    run = partial(engine.evaluate, readers, stored, uri=f"{s3}/out", vectors_uri=f"{s3}/vectors", pool=POOL, say=print)
    evaluated = run()
    assert evaluated.embedded == 63 and run().embedded == 0
    there, here_ = (
        report.read_values(evaluated, f"{s3}/out"),
        report.read_values(evaluate(root, tmp_path), str(tmp_path)),
    )
    for task in made_up_tasks():
        assert there["one"][task]["ndcg_at_5"] == pytest.approx(here_["one"][task]["ndcg_at_5"])


def test_prompts_of_a_recipe_are_sets_that_there_are() -> None:
    assert load_recipe("demo", ["evaluate.prompts=vlm2vec"]).evaluate.prompts == "vlm2vec"
    with pytest.raises(ValueError, match=r"evaluate.prompts='mocca' unknown; use one of none, moca"):
        load_recipe("demo", ["evaluate.prompts=mocca"])
