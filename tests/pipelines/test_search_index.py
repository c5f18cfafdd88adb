"""An index follows its folder, and goes on where a run was stopped, killed or refused."""

import shutil

import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster import storage
from moca_core.embedder import Embedder
from moca_core.types import Segment
from pipelines.search import main
from pipelines.searching import index as indexing
from pipelines.searching.searcher import Searcher
from tests.exported import exported_model
from tests.pipelines.conftest import png
from tests.pipelines.test_search import SECTIONS, first, make, write_documents


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return exported_model(tmp_path_factory.mktemp("search"))


@pytest.fixture
def counted(monkeypatch):
    """The numbers of contents of every call of Embedder.encode."""
    calls, encode = [], Embedder.encode
    monkeypatch.setattr(
        Embedder, "encode", lambda self, contents: calls.append(len(contents)) or encode(self, contents)
    )
    return calls


def test_the_index_follows_the_folder(model, tmp_path, counted, capsys):
    folder, out = write_documents(tmp_path / "folder"), tmp_path / "index"
    assert make(folder, model, out) == 0
    everything = sum(counted)
    assert "rejected: {'not_an_image': 1}" in capsys.readouterr().err
    counted.clear()
    assert make(folder, model, out) == 0 and counted == []
    assert "rejected: {'not_an_image': 1}" in capsys.readouterr().err
    assert pq.read_table(out / "rejected.parquet")["where"].to_pylist() == ["broken.png"]
    (folder / "figures" / "0.png").rename(folder / "moved.png")
    shutil.copy(folder / "figures" / "1.png", folder / "copy.png")
    assert make(folder, model, out) == 0 and counted == []
    assert first(Searcher(str(out)), image=png(0)).path == "moved.png"
    (folder / "figures" / "shown.png").write_bytes(png(51, 300, 200))  # the Markdown beside it is another one now, too
    (folder / "manual.md").unlink()
    counted.clear()
    assert make(folder, model, out) == 0 and sum(counted) == 2
    searcher = Searcher(str(out))
    assert len(searcher) == everything - 6
    assert all(hit.path != "manual.md" for hit in searcher.search((Segment(text=SECTIONS[0]),), 100))
    assert sorted(path.name for path in out.iterdir()) == [
        "entries-4.parquet",
        "index.json",
        "nearest-4.faiss",
        "rejected.parquet",
    ]


def test_a_stopped_index_is_taken_over(model, tmp_path, monkeypatch, counted):
    monkeypatch.setattr(indexing, "BATCH", 4)
    monkeypatch.setattr(indexing, "PART_ROWS", 4)
    folder, out = write_documents(tmp_path / "folder"), tmp_path / "index"
    with monkeypatch.context() as patch:
        encode, calls = Embedder.encode, []

        def dying(self, contents):
            calls.append(len(contents))
            if len(calls) == 4:
                raise KeyboardInterrupt
            return encode(self, contents)

        patch.setattr(Embedder, "encode", dying)
        assert make(folder, model, out) == 130
    kept = sum(pq.read_table(path).num_rows for path in out.glob("parts-*/part-*.parquet"))
    assert kept >= 4 and not (out / "index.json").exists()
    counted.clear()
    assert make(folder, model, out) == 0
    assert sum(counted) == 19 - kept and len(Searcher(str(out))) == 19


def test_a_run_that_is_killed_before_its_parts_are_gone_leaves_every_entry_once(model, tmp_path, monkeypatch, counted):
    folder, out = write_documents(tmp_path / "folder"), tmp_path / "index"
    with monkeypatch.context() as patch:
        patch.setattr(storage, "delete", interrupted)
        assert make(folder, model, out) == 130
    assert (out / "index.json").exists() and list(out.glob("parts-*"))
    counted.clear()
    (folder / "page.html").unlink()
    assert make(folder, model, out) == 0 and counted == []
    searcher = Searcher(str(out))
    assert len(searcher) == len({hit.id for hit in searcher.search((Segment(text="a"),), 100)}) == 18
    assert not list(out.glob("parts-*"))


def test_a_run_that_is_killed_while_it_writes_its_first_index_is_taken_over(model, tmp_path, monkeypatch, counted):
    folder, out = write_documents(tmp_path / "folder"), tmp_path / "index"
    with monkeypatch.context() as patch:
        patch.setattr("faiss.write_index", interrupted)
        assert make(folder, model, out) == 130
    (out / f"{storage.UNFINISHED}0").touch()  # what a kill in the middle of a file leaves
    counted.clear()
    assert make(folder, model, out) == 0 and counted == [] and len(Searcher(str(out))) == 19
    assert not list(out.glob(f"{storage.UNFINISHED}*"))


def interrupted(*args):
    raise KeyboardInterrupt


def write_pdf(path, pages=6):
    """Every second page is too long and narrow to be used, the first one too."""
    sizes = [(300, 300) if n % 2 else (9000, 20) for n in range(pages)]
    first_page, *more = (Image.new("RGB", size, (n * 20, 0, 0)) for n, size in enumerate(sizes))
    first_page.save(path, save_all=True, append_images=more)


def test_what_a_refused_run_has_read_counts_in_every_later_run(model, tmp_path, counted, capsys):
    folder, out = tmp_path / "folder", tmp_path / "index"
    folder.mkdir()
    write_pdf(folder / "a.pdf")
    command = ["index", str(folder), "--model", model, "--out", str(out)]

    def refused(name):
        assert main(command) == 2
        assert "3 of 6 rows rejected" in capsys.readouterr().err
        rejected = pq.read_table(out / "rejected.parquet")
        assert rejected["where"].to_pylist() == [f"{name} page {number}" for number in (1, 3, 5)]

    refused("a.pdf")
    refused("a.pdf")
    (folder / "a.pdf").rename(folder / "moved.pdf")
    refused("moved.pdf")
    assert main([*command, "--max-rejected-fraction", "0.6"]) == 0 and len(Searcher(str(out))) == 3
    refused("moved.pdf")
    assert sum(counted) == 3
    (folder / "moved.pdf").rename(tmp_path / "away.pdf")
    (folder / "0.png").write_bytes(png(0))
    assert main(command) == 0 and pq.read_table(out / "rejected.parquet").num_rows == 0
    (tmp_path / "away.pdf").rename(folder / "a.pdf")
    assert main(command) == 2 and "3 of 7 rows rejected" in capsys.readouterr().err
