"""embed.py: every kind of input becomes the vector of its content, a killed run goes on, and what is broken is kept aside."""

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moca_core.embedder import Embedder
from moca_core.types import Segment
from pipelines.embed import main
from pipelines.embedding import shares
from tests.exported import exported_model
from tests.pipelines.conftest import png, words

ROOT = Path(__file__).parents[2]


def text(value):
    return (Segment(text=value),)


def image(value):
    return (Segment(image=value),)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return exported_model(tmp_path_factory.mktemp("embed"))


@pytest.fixture(scope="module")
def embedder(model):
    return Embedder(model, device="cpu")


@pytest.fixture
def folder(tmp_path):
    """Files of all kinds; `expected(folder)` is what they are called and hold."""
    place = tmp_path / "folder"
    (place / "notes").mkdir(parents=True)
    (place / "b.png").write_bytes(png(1))
    (place / "a.txt").write_text("a plain text")
    (place / "notes" / "page.md").write_text("# Title\n\nbefore ![x](p.png) after ![gone](gone.png)\n")
    (place / "notes" / "p.png").write_bytes(png(2))
    (place / "program.py").write_text("nothing to read here")
    lines = [{"text": "one"}, {"content": [{"text": "two"}, {"image": "p.png"}]}, {"image": "p.png", "text": "three"}]
    (place / "notes" / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pq.write_table(pa.table({"text": ["four", None], "image": [None, png(3)]}), place / "table.parquet")
    return place


def expected(folder):
    rows = [(text("one"), 0), ((*text("two"), *image(png(2))), 16), ((*image(png(2)), *text("three")), 67)]
    return {
        f"{folder}/a.txt": text("a plain text"),
        f"{folder}/b.png": image(png(1)),
        f"{folder}/notes/p.png": image(png(2)),
        f"{folder}/notes/page.md": (*text("# Title\n\nbefore "), *image(png(2)), *text(" after ")),
        f"{folder}/table.parquet row 0": text("four"),
        f"{folder}/table.parquet row 1": image(png(3)),
        **{f"{folder}/notes/rows.jsonl byte {at}": content for content, at in rows},
    }


def read(path):
    """{item: vector}, in order."""
    return {row["item"]: np.array(row["vector"], np.float32) for row in pq.read_table(path).to_pylist()}


def assert_same(found, wanted):
    assert list(found) == list(wanted)
    np.testing.assert_allclose(np.stack(list(found.values())), np.stack(list(wanted.values())), atol=1e-5)


def vectors_of(embedder, contents):
    return dict(zip(contents, embedder.encode(list(contents.values())), strict=True))


def test_a_folder_of_everything(model, embedder, folder, tmp_path, capsys):
    out = tmp_path / "vectors.parquet"
    assert main(["--model", model, "--out", str(out), "a text", str(folder)]) == 0, capsys.readouterr().err
    assert_same(read(out), vectors_of(embedder, {"a text": text("a text"), **expected(folder)}))
    assert "10 vectors of 32 dimensions" in capsys.readouterr().out
    rejected = pq.read_table(tmp_path / "vectors.rejected.parquet").to_pylist()
    assert [(row["reason"], row["where"]) for row in rejected] == [
        ("dropped_image_missing", f"{folder}/notes/page.md segment 3")
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "vectors.parquet", "vectors.rejected.parquet"]


def test_pages_of_a_pdf_are_pictures(model, embedder, tmp_path):
    from matplotlib.backends.backend_pdf import PdfPages
    from matplotlib.figure import Figure

    from moca_core.sources import Location, pdf

    path = tmp_path / "two.pdf"
    with PdfPages(path) as pages:
        for words_of_page in ("first", "second"):
            figure = Figure((3, 4))
            figure.text(0.2, 0.5, words_of_page, fontsize=30)
            pages.savefig(figure)
    out = tmp_path / "vectors.parquet"
    assert main(["--model", model, "--out", str(out), str(path)]) == 0
    location = Location(pa.fs.LocalFileSystem(), str(path))
    whole = next(pdf.read_unit(location, {"path": str(path)})).content
    assert [segment.text for segment in whole] == [None, "first", None, "second"]
    pictures = {f"{path} page {n + 1}": (whole[2 * n],) for n in range(2)}
    assert_same(read(out), vectors_of(embedder, pictures))


def test_lines_and_npy(model, embedder, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("first line\n\nsecond line\n"))
    out = tmp_path / "vectors.npy"
    assert main(["--model", model, "--out", str(out), "-"]) == 0
    names = [json.loads(line) for line in (tmp_path / "vectors.names.jsonl").read_text().splitlines()]
    assert names == ["first line", "second line"]
    np.testing.assert_allclose(np.load(out), embedder.encode([text(name) for name in names]), atol=1e-5)


def test_columns_of_a_table(model, embedder, tmp_path):
    pq.write_table(pa.table({"said": ["one", "two"], "key": [7, 8], "text": ["x", "y"]}), tmp_path / "t.parquet")
    out = tmp_path / "vectors.parquet"
    given = ["--column", "text=said", "--column", "name=key", "--out", str(out), str(tmp_path / "t.parquet")]
    assert main(["--model", model, *given]) == 0
    assert_same(read(out), vectors_of(embedder, {"7": text("one"), "8": text("two")}))


def test_prompts_stand_where_the_benchmarks_put_them(model, embedder, folder, tmp_path, capsys):
    """Before texts of queries, behind images that are alone; elsewhere not."""
    page, words_beside = str(folder / "b.png"), str(folder / "notes" / "rows.jsonl")
    shown = "Understand the content of the provided document image."
    asks = "Find a document image that matches the given query: "
    found = {}
    for name, more in (("candidates", []), ("queries", ["--queries"])):
        out = tmp_path / f"{name}.parquet"
        assert (
            main(
                ["--model", model, "--prompts", "vlm2vec", *more, "--out", str(out), "a plain text", page, words_beside]
            )
            == 0
        )
        found[name] = list(read(out).values())

    def embedded(*contents):
        return embedder.encode([*contents])

    two, three = (*text("two"), *image(png(2))), (*image(png(2)), *text("three"))
    candidates = embedded(text("a plain text"), (*image(png(1)), *text(shown)), text("one"), two, three)
    np.testing.assert_allclose(found["candidates"], candidates, atol=1e-5)
    two, three = (*text(asks + "two"), *image(png(2))), (*image(png(2)), *text(asks + "three"))
    queries = embedded(text(asks + "a plain text"), image(png(1)), text(asks + "one"), two, three)
    np.testing.assert_allclose(found["queries"], queries, atol=1e-5)
    assert main(["--model", model, "--queries", "a text"]) == 2
    assert "--queries with --prompts none changes nothing: of them only vlm2vec ask" in capsys.readouterr().err


def test_rank_names_the_nearest_first(model, folder, capsys):
    assert main(["--model", model, "a plain text", "--rank", "something else", str(folder / "a.txt")]) == 0
    first = capsys.readouterr().out.splitlines()[0].split()
    assert first == ["1.0000", str(folder / "a.txt")]


class Counting:
    """Stands before Embedder.encode: counts contents, and dies at call number `dies_at`."""

    def __init__(self, monkeypatch, dies_at=None):
        self.calls, self.contents, self.dies_at, self.encode = 0, 0, dies_at, Embedder.encode
        monkeypatch.setattr(Embedder, "encode", lambda embedder, contents: self(embedder, contents))

    def __call__(self, embedder, contents):
        self.calls += 1
        if self.calls == self.dies_at:
            raise KeyboardInterrupt
        self.contents += len(contents)
        return self.encode(embedder, contents)


def write_many(folder, broken=()):
    """Twenty texts in two tables, with an image that is none in these rows of the first."""
    folder.mkdir()
    for part in range(2):
        rows = [{"text": f"{part} {n} {words(5, n)}", "image": None} for n in range(10)]
        for n in broken if part == 0 else ():
            rows[n] = {"text": None, "image": b"this is no image"}
        schema = pa.schema([("text", pa.string()), ("image", pa.binary())])
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / f"{part}.parquet")


@pytest.mark.parametrize("dies_at", [1, 2, 3, 4, 6])
def test_a_stopped_run_goes_on_without_embedding_again(model, tmp_path, monkeypatch, dies_at):
    monkeypatch.setattr(shares, "PART_ROWS", 4)
    write_many(tmp_path / "in", broken=[2])
    command = ["--model", model, "--max-rejected-fraction", "0.2", str(tmp_path / "in"), "--out"]
    with monkeypatch.context() as patch:
        counting = Counting(patch, dies_at)
        assert main([*command, str(tmp_path / "stopped.parquet")]) == 130
        assert not (tmp_path / "stopped.parquet").exists()
    with monkeypatch.context() as patch:
        again = Counting(patch)
        assert main([*command, str(tmp_path / "stopped.parquet")]) == 0
        assert again.contents == 19 - counting.contents
    assert main([*command, str(tmp_path / "whole.parquet")]) == 0
    for suffix in ("parquet", "rejected.parquet"):
        stopped, whole = (pq.read_table(tmp_path / f"{name}.{suffix}") for name in ("stopped", "whole"))
        assert stopped.num_rows == {"parquet": 19, "rejected.parquet": 1}[suffix]
        assert stopped.equals(whole)


def test_a_killed_process_leaves_whole_parts(model, tmp_path):
    """Killed without a chance to tidy up, as soon as the first part is there."""
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": words(60, n)}) + "\n" for n in range(1000)))
    out = tmp_path / "vectors.parquet"
    command = ["pipelines/embed.py", "--model", model, "--out", str(out), str(tmp_path / "lines.jsonl")]
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("vectors.parquet.parts/*/part-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    parts = sorted(tmp_path.glob("vectors.parquet.parts/*/part-*"))
    assert parts and sum(pq.read_table(part).num_rows for part in parts) < 1000 and not out.exists()
    times = {part: part.stat().st_mtime_ns for part in parts}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Embed := shares.Embed, "write_part", spied(Embed.write_part, times))
        assert main(["--model", model, "--out", str(out), str(tmp_path / "lines.jsonl")]) == 0
    assert len(read(out)) == 1000


def spied(write_part, times):
    def write(self, *args):
        assert all(part.stat().st_mtime_ns == time_ns for part, time_ns in times.items())
        return write_part(self, *args)

    return write


def test_too_many_bad_inputs_fail_and_a_higher_rate_takes_what_is_there(model, tmp_path, monkeypatch, capsys):
    write_many(tmp_path / "in", broken=[0, 5])
    command = ["--model", model, "--out", str(tmp_path / "vectors.parquet"), str(tmp_path / "in")]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "2 of 20 rows rejected (not_an_image 2)" in said and not (tmp_path / "vectors.parquet").exists()
    rejected = pq.read_table(tmp_path / "vectors.rejected.parquet")
    assert rejected["where"].to_pylist() == [f"{tmp_path}/in/0.parquet row {n}" for n in (0, 5)]
    counting = Counting(monkeypatch)
    assert main([*command, "--max-rejected-fraction", "0.1"]) == 0
    assert counting.contents == 0 and len(read(tmp_path / "vectors.parquet")) == 18


def test_parts_of_another_run_are_not_mixed_in(model, tmp_path, monkeypatch, capsys):
    write_many(tmp_path / "in")
    command = ["--model", model, "--out", str(tmp_path / "vectors.parquet"), str(tmp_path / "in")]
    with monkeypatch.context() as patch:
        Counting(patch, dies_at=1)
        assert main(command) == 130
    other = exported_model(tmp_path / "other", "qwen2_vl")
    for changed, what in (
        ([*command, "one text more"], "begun with other inputs"),
        ([*command, "--max-tokens", "100"], "begun with other max tokens"),
        (["--model", other, *command[2:]], "begun with other model"),
    ):
        assert main(changed) == 2
        assert what in capsys.readouterr().err
    assert main(command) == 0


@pytest.mark.parametrize(
    "given, message",
    [
        (["--out", "v.csv", "a"], ".parquet or .npy is expected"),
        (["--out", "FOLDER/v.npy", "FOLDER"], "name a place outside"),
        (["--out", "FOLDER/v.npy", "file://FOLDER"], "name a place outside"),
        (["--out", "file://FOLDER/notes/v.npy", "FOLDER"], "name a place outside"),
        (["--out", "FOLDER/table.parquet", "FOLDER/table.parquet"], "name a place outside"),
        (["--out", "s3://pages/in/v.npy", "a", "s3://pages/in/"], "name a place outside"),
        (["--column", "colour=red", "a"], "--column colour=red"),
        (["--workers", "2", "a"], "--workers needs --out"),
        (["--rank", "a"], "at least one other"),
        (["--max-rejected-fraction", "1", "a"], "below 1"),
        (["missing.pdf"], "no such file"),
        (["FOLDER/bytes.bin"], "neither an image"),
        (["FOLDER/text.png"], "not_an_image"),
        (["  "], "empty"),
    ],
)
def test_what_the_user_can_mend_is_said(model, folder, capsys, given, message):
    (folder / "bytes.bin").write_bytes(b"\xff\xfe\x00\x80")
    (folder / "text.png").write_text("no image")
    assert main(["--model", model, *(part.replace("FOLDER", str(folder)) for part in given)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_workers_of_ray_write_the_same_and_go_on_too(ray_session, model, tmp_path, monkeypatch):
    monkeypatch.setattr(shares, "PART_ROWS", 4)
    write_many(tmp_path / "in", broken=[2])
    command = ["--model", model, "--max-rejected-fraction", "0.2", str(tmp_path / "in"), "--out"]
    with monkeypatch.context() as patch:
        Counting(patch, dies_at=2)
        assert main([*command, str(tmp_path / "two.parquet")]) == 130
    assert main([*command, str(tmp_path / "two.parquet"), "--workers", "2"]) == 0
    assert main([*command, str(tmp_path / "one.parquet")]) == 0
    assert_same(read(tmp_path / "two.parquet"), read(tmp_path / "one.parquet"))
