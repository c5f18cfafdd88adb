"""Which checkpoints are kept, and that nothing but the ledger decides it."""

import itertools
import math
from pathlib import Path

import pytest

from cluster import ledger, storage
from cluster.ledger import Entry


def save(run: Path, step: int, score: float | None = None, keep: int = 2) -> None:
    """As a run does: the files first, the record after them."""
    (run / f"step_{step:08d}").mkdir(parents=True)
    (run / f"step_{step:08d}" / "rank0").write_text(str(step))
    ledger.add(str(run), Entry(step, score), keep)


def folders(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in run.glob("step_*"))


def test_the_newest_and_the_best_are_kept_for_any_order_of_scores(tmp_path: Path) -> None:
    scores = [0.1, 0.2, 0.3, 0.4, 0.5]
    for number, order in enumerate(itertools.permutations(scores)):
        run = tmp_path / str(number)
        for step, score in enumerate(order):
            save(run, step, score)
        expected = {3, 4, order.index(0.1)}
        assert {entry.step for entry in ledger.read(str(run))} == set(folders(run)) == expected
        assert ledger.read(str(run))[-1].step == 4
        assert ledger.best(ledger.read(str(run))) == Entry(order.index(0.1), 0.1)


@pytest.mark.parametrize(
    ("scores", "best", "kept"),
    [
        ([None, None, None], None, [1, 2]),
        ([math.nan, math.nan, math.nan], None, [1, 2]),
        ([5.0, None, None, None], 0, [0, 2, 3]),
        ([math.inf, math.nan, None, 1.0], 3, [2, 3]),
        ([-math.inf, 1.0, 1.0, 1.0], 0, [0, 2, 3]),
        ([1.0, 1.0, 1.0, 2.0, 3.0], 2, [2, 3, 4]),
    ],
)
def test_scores_that_are_missing_or_strange(
    scores: list[float | None], best: int | None, kept: list[int], tmp_path: Path
) -> None:
    for step, score in enumerate(scores):
        save(tmp_path, step, score)
    found = ledger.best(ledger.read(str(tmp_path)))
    assert (found.step if found else None) == best
    assert [entry.step for entry in ledger.read(str(tmp_path))] == folders(tmp_path) == kept


@pytest.mark.parametrize("place", ["local", "s3"])
def test_what_is_not_recorded_is_invisible_and_swept(place: str, s3: str, tmp_path: Path) -> None:
    run = storage.join(s3 if place == "s3" else str(tmp_path), "swept")
    assert ledger.read(run) == []
    for step in (2, 4, 6):
        storage.write_atomic(storage.join(run, ledger.name_of(step), "rank0"), b"x")
    storage.write_atomic(storage.join(run, "starts", "1"), b"")
    ledger.add(run, Entry(4, 0.5), keep=1)
    assert ledger.read(run) == [Entry(4, 0.5)]
    ledger.sweep(run)
    assert [name for name, _ in storage.list_files(run)] == ["checkpoints.json", "starts/1", "step_00000004/rank0"]


def test_a_checkpoint_that_cannot_be_removed_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    save(tmp_path, 1, keep=1)

    def refuse(uri: str) -> None:
        raise OSError(f"{uri} is held")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "delete", refuse)
        save(tmp_path, 2, keep=1)
    assert "step_00000001 is held" in caplog.text
    assert folders(tmp_path) == [1, 2]
    ledger.sweep(str(tmp_path))
    assert folders(tmp_path) == [2]
