"""The report stands alone, escapes what people wrote, and tells of runs that failed, were cut short or did nothing."""

import base64
import io
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from cluster import storage
from moca_core.data.schema import task_to_tables
from moca_core.types import EvalTask, Query, Segment
from pipelines import full, report
from pipelines.pictures.scores import score_dots
from pipelines.reporting.gallery import choose, entries, keep_galleries, rows_at
from pipelines.reporting.verdict import timeline
from pipelines.runner import outcome as outcomes
from pipelines.runner import record
from pipelines.runner.outcome import Attempt, Outcome
from pipelines.runner.record import Record
from pipelines.runner.step import Context, Step
from pipelines.tables import read_table, table_writer
from tests.pipelines.conftest import Books, png

SCRIPT = '<script>alert("x")</script>'
MODELS = ("base", "finetune")
QUERIES, CANDIDATES = 20, 12
TASK = f"t {SCRIPT}"


class Page(HTMLParser):
    """What a browser would fetch or run, and the text that it would show."""

    def __init__(self, html: bytes) -> None:
        super().__init__()
        self.fetched, self.scripts, self.text, self.open, self.images = [], 0, [], [], 0
        self.feed(html.decode())
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.scripts += tag == "script" or any(name.startswith("on") for name, _ in attributes)
        self.images += tag == "img"
        self.fetched += [
            value
            for name, value in attributes
            if name in ("src", "href", "srcset", "data", "action", "poster")
            and not value.startswith(("data:image/", "#"))
        ]
        self.fetched += [value for name, value in attributes if name == "style" and "url(" in value]
        if tag not in ("meta", "img", "br", "link", "input", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            assert "url(" not in data and "@import" not in data
        else:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def task() -> EvalTask:
    queries = [
        Query(
            (Segment(text=f"question {n} {SCRIPT}"), Segment(image=png(n)) if n % 2 else Segment(text="?")),
            (n % CANDIDATES,),
        )
        for n in range(QUERIES)
    ]
    candidates = [(Segment(text=f"answer {n} " + "long " * 90),) for n in range(CANDIDATES - 1)]
    return EvalTask(TASK, tuple(queries), (*candidates, (Segment(image=b"no image"),)))


def ranking(query: int, right_first: bool) -> dict:
    """The right answer first, or last."""
    right = query % CANDIDATES
    others = [n for n in range(CANDIDATES) if n != right]
    order = [right, *others] if right_first else [*others, right]
    similarity = np.linspace(0.9, 0.1, CANDIDATES).astype(np.float32)
    return {
        "precision_at_1": float(right_first),
        "right_rank": 1.0 if right_first else float(CANDIDATES),
        "right_similarity": float(similarity[order.index(right)]),
        "top": order[:10],
        "similarity": similarity[:10].tolist(),
    }


def write(uri: str, table: pa.Table, rows_per_group: int = 3) -> None:
    with table_writer(uri, table.schema, rows_per_group) as writer:
        writer.write(table)


def made(root: str, step: str, result: dict) -> None:
    uri = storage.join(root, step, "f" * 16)
    record.write(uri, Record(step, "f" * 16, {}, result, "2026-11-23T08:00:10+00:00", 12.5))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A finished run of three steps, one of them skipped."""
    root = str(tmp_path / "root")
    pairs, evaluate = (storage.join(root, step, "f" * 16) for step in ("pairs", "evaluate"))
    for part, table in zip(("queries", "candidates"), task_to_tables(task()), strict=True):
        write(storage.join(pairs, "tasks/t", f"{part}.parquet"), table)
    for model, right in (("base", 2), ("finetune", 15)):
        rows = [ranking(n, n < right) for n in range(QUERIES)]
        write(storage.join(evaluate, "rankings", model, "t.parquet"), pa.Table.from_pylist(rows))
    scores = {TASK: {"chance": 1 / CANDIDATES, "base": 0.1, "finetune": 0.75}}
    storage.write_atomic(storage.join(evaluate, "scores.png"), score_dots(scores))
    made(
        root,
        "pairs",
        {
            "train": {"t": [["a", 7]]},
            "tasks": {TASK: {"path": "tasks/t", "queries": 20, "candidates": 12}},
            "rejected": {"no_answer": 3},
        },
    )
    made(
        root,
        "evaluate",
        {
            "scores": scores,
            "queries": {TASK: QUERIES},
            "rankings": {model: {TASK: f"rankings/{model}/t.parquet"} for model in MODELS},
            "intervals": {TASK: {"finetune": {"mean": 0.75, "low": 0.55, "high": 0.9}}},
            "comparison": {"all": {"difference": {"mean": 0.65, "low": 0.4, "high": 0.8}, "p_value": 0.001}},
        },
    )
    made(root, "export", {"model": "model", "cosine": {"transformers": 0.99999}})
    steps = [
        Attempt("pairs", f"pairs/{'f' * 16}", "unchanged since then", "skipped"),
        Attempt(
            "evaluate",
            f"evaluate/{'f' * 16}",
            "never ran here",
            "done",
            "2026-11-23T08:00:10+00:00",
            "2026-11-23T08:00:40+00:00",
        ),
        Attempt(
            "export",
            f"export/{'f' * 16}",
            "never ran here",
            "done",
            "2026-11-23T08:00:40+00:00",
            "2026-11-23T08:01:40+00:00",
        ),
    ]
    outcome = Outcome(root, "my.yaml", "demo", ["pretrain.steps: 200 -> 40"], {}, "sqlite:///x", steps)
    outcome.started, outcome.ended, outcome.status = (
        "2026-11-23T08:00:00+00:00",
        "2026-11-23T08:01:40+00:00",
        "FINISHED",
    )
    outcome.environment = {"commit": "c0ffee" * 7, "torch": "2.13"}
    outcome.write()
    logged = []
    monkeypatch.setattr(
        "cluster.tracking.attach",
        lambda uri, run: type("Run", (), {"log_artifact": lambda self, path: logged.append(path)})(),
    )
    return root


def written(root: str) -> Page:
    assert report.main(["--root", root]) == 0
    return Page(storage.read_bytes(storage.join(root, "report.html")))


def test_a_report_stands_alone_and_escapes_what_people_wrote(root: str) -> None:
    page = written(root)
    assert page.fetched == [] and page.scripts == 0
    assert page.images > 1 and SCRIPT in page.words, "as text"


def test_it_says_what_was_run_and_how_it_went(root: str) -> None:
    words = written(root).words
    for part in (
        "finetune puts a right answer first for 75.0% of queries",
        "base 10.0%",
        "55.0% to 90.0%",
        "+65.0 points (+40.0 to +80.0, p = 0.001), more than",
        "pretrain.steps: 200 -> 40",
        "c0ffee",
        "3 pairs could not be used",
        "no answer",
        "skipped: made 2026-11-23 in 12 s",
        "embed.py --model",
    ):
        assert part in words, part


def test_a_failed_run_says_which_step_and_why_and_shows_what_there_is(root: str) -> None:
    outcome = outcomes.read(root)
    outcome.status, outcome.error = "FAILED", f"step 3: loss nan {SCRIPT}"
    outcome.steps[1].status = "failed"
    outcome.steps[2].status, outcome.steps[2].started = "waiting", ""
    for step in ("evaluate", "export"):
        storage.delete(storage.join(root, step))
    outcome.write()
    page = written(root)
    assert "Failed: evaluate" in page.words and outcome.error in page.words and page.scripts == 0
    assert "There are no scores" in page.words and "not run" in page.words and "3 pairs could not" in page.words
    assert "embed.py" not in page.words


def test_a_run_that_was_cut_off_is_drawn_up_to_where_it_came(root: str) -> None:
    outcome = outcomes.read(root)
    outcome.status, outcome.ended = "RUNNING", ""
    outcome.steps[2].status, outcome.steps[2].ended = "running", ""
    outcome.write()
    assert "The run has not ended" in written(root).words
    assert [bar.status for bar in timeline(outcome, {})] == ["skipped", "done", "running"]


def test_bars_stand_where_their_steps_ran(root: str) -> None:
    bars = {bar.step: bar for bar in timeline(outcomes.read(root), {})}
    assert (bars["evaluate"].left, bars["evaluate"].width) == (10, 30)
    assert (bars["export"].left, bars["export"].width) == (40, 60)
    assert bars["pairs"].width == 0 and bars["pairs"].label == "skipped"


def test_a_root_that_was_moved_is_reported_where_it_is(root: str, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    Path(root).rename(moved)
    words = written(str(moved)).words
    assert str(moved) in words and root not in words and "75.0% of queries" in words


def test_no_run_no_report(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert report.main(["--root", str(tmp_path)]) == 2
    assert "has no run.json" in capsys.readouterr().err


def test_the_gallery_has_right_and_wrong_ones_as_they_occur() -> None:
    precision = [1.0] * 30 + [0.0] * 10
    chosen = choose(precision, 8, ("a",))
    assert len(set(chosen)) == 8 and sum(precision[n] for n in chosen) == 6
    assert chosen == choose(precision, 8, ("a",)) != choose(precision, 8, ("b",))
    assert sorted(choose([0.0, 1.0], 8, ("a",))) == [0, 1] and choose([0.0] * 5, 2, ("a",)) != []
    assert sum(choose([1.0] * 99 + [0.0], 8, ("a",))[k] == 99 for k in range(8)) == 0, "1 % of 8 is none"


def test_right_answers_are_marked_and_no_others() -> None:
    rankings = [ranking(n, n == 0) for n in range(3)]
    first, last = entries({0: [0], 2: [2, 11]}, rankings)
    assert [found.right for found in first.found] == [True, False, False, False, False] and first.rank == 1
    assert not any(found.right for found in last.found) and last.rank == CANDIDATES and last.answer == 2
    assert last.others == 1 and [found.candidate for found in last.found] == rankings[2]["top"][:5]


def test_galleries_are_kept_as_pages_and_pictures(root: str) -> None:
    pairs, evaluate = (storage.join(root, step, "f" * 16) for step in ("pairs", "evaluate"))
    books = Books()
    context = Context("evaluate", None, {}, evaluate, "", None, books, "", print)
    keep_galleries(
        context, {TASK: f"{pairs}/tasks/t"}, {model: {TASK: f"rankings/{model}/t.parquet"} for model in MODELS}
    )
    assert [Path(path).name for path in books.artifacts] == ["base.html", "base.png", "finetune.html", "finetune.png"]
    page = Page(storage.read_bytes(f"{evaluate}/gallery/finetune.html"))
    assert page.fetched == [] and page.scripts == 0
    assert page.words.count("right answer: rank 1 ✓") == 6 and page.words.count("rank 12") == 2  # 15 of 20 are right
    assert page.words.count("✓") == 6 * 2 + 1, "beside the rank, on the card, and in the legend"
    assert "[an image that cannot be read]" in page.words and " …" in page.words
    assert green(f"{evaluate}/gallery/finetune.png") > 4 * green(f"{evaluate}/gallery/base.png") > 0, (
        "6 of 8, and 1 of 8"
    )


def green(uri: str) -> int:
    """Pixels of the frames of right answers."""
    pixels = np.asarray(Image.open(io.BytesIO(storage.read_bytes(uri))).convert("RGB"))
    return int((pixels == [0, 0x9E, 0x73]).all(axis=2).sum())


def test_thumbnails_are_small_copies(root: str) -> None:
    html = written(root) and storage.read_bytes(storage.join(root, "report.html")).decode()
    small = [
        Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"data:image/webp;base64,([^\"]+)", html)
    ]
    assert small and all(image.size == (60, 60) for image in small)
    assert len(html) < 300_000


def test_rows_are_found_by_their_places(root: str) -> None:
    uri = storage.join(root, "pairs", "f" * 16, "tasks/t/candidates.parquet")
    whole = read_table(uri).to_pylist()
    found = rows_at(uri, [7, 0, 11])
    assert list(found) == [7, 0, 11] and all(row == whole[place] for place, row in found.items())


@dataclass(frozen=True)
class Toy:
    value: int = 1


def toy_steps(recipe) -> list[Step]:
    def corpus(context) -> dict:
        return {"documents": 3, "sources": ["web"], "rejected": {"empty": 2}}

    def pairs(context) -> dict:
        raise ValueError(f"no pairs in {SCRIPT}")

    return [Step("corpus", corpus, Toy()), Step("pairs", pairs, Toy()), Step("clean", corpus, Toy(), needs=("pairs",))]


def test_the_command_leaves_a_report_of_a_run_that_failed_or_was_cut_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("pipelines.full.build", toy_steps)
    monkeypatch.setattr("pipelines.full.left_out", lambda recipe: {"mine": "mine.negatives=0"})
    monkeypatch.setattr("pipelines.tracked.connect", lambda cluster: None)
    monkeypatch.setattr("pipelines.tracked.preflight", lambda *given, **named: None)
    root = str(tmp_path / "root")
    command = ["--root", root, "--set", "pretrain.steps=7"]
    assert full.main(command) == 1
    assert f"look:  {root}/report.html" in capsys.readouterr().err
    page = Page(storage.read_bytes(f"{root}/report.html"))
    assert page.scripts == 0 and page.fetched == []
    for part in (
        "Failed: pairs",
        f"no pairs in {SCRIPT}",
        "pretrain.steps: 200 -> 7",
        "2 documents could not be used",
        "not run",
    ):
        assert part in page.words, part
    assert outcomes.read(root).failed == ["pairs"]
    assert [link.name for link in (tmp_path / "root" / "latest").iterdir()] == ["corpus"]  # what is finished

    assert full.main([*command, "--until", "corpus"]) == 0
    words = Page(storage.read_bytes(f"{root}/report.html")).words
    assert "The run finished." in words and "skipped: made" in words and "2 documents could not be used" in words

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    logged = [a.path for a in client.list_artifacts(outcomes.read(root).tracking_run)]
    assert logged == ["report.html"]
