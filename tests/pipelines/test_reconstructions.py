"""Looking at pre-training changes nothing of it, and what was seen is kept and drawn."""

import io
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from cluster import collectives, storage
from cluster.engine import EngineConfig, open_engine
from cluster.torch_engine import TorchEngine
from cluster.workers import ClusterConfig
from moca_core.attention import set_attention
from moca_core.backbone import load_backbone
from moca_core.data.masking import blank
from moca_core.objective.pretraining import MaskedModelling
from moca_core.reconstruction import RebuiltImage, Word
from moca_core.spec import read_spec
from pipelines.pictures.reconstructions import Moment, draw_development, draw_moment, read_moments
from pipelines.steps.pretrain import PretrainConfig
from pipelines.training import row_streams
from pipelines.training.config import TrainingConfig
from pipelines.training.loop import train
from pipelines.training.plan import hold_out, row_plan
from pipelines.training.reconstructions import Reconstructions, moments_of
from tests.ranks import on_ranks, small_weights_shared
from tests.stock import Documents
from tests.tiny import tiny_model

torch.set_num_threads(1)
STEPS = 4


def trained(folder, uri, stage, looking):
    """(weights, reported losses) after STEPS steps; the second rank has a blank batch in every other step."""
    spec, documents = read_spec(folder), Documents(folder)
    torch.manual_seed(0)
    model = load_backbone(folder)
    set_attention(model, "bidirectional")
    objective = MaskedModelling(model, spec)
    config = EngineConfig(zero_stage=stage or 0, max_grad_norm=1.0)
    with small_weights_shared():
        engine = TorchEngine(objective, config) if stage is None else open_engine(objective, config)
    job = {
        "config": SimpleNamespace(steps=STEPS, reconstructions=4 if looking else 0),
        "tokenizer": f"{folder}/tokenizer.json",
        "uri": uri,
    }
    rows = [lambda: documents.batch("images", "word"), lambda: documents.batch("text")]
    watch = Reconstructions(job, spec, engine.rank, rows)
    names, losses = list(Documents.NAMES), []

    def batches():
        for step in range(STEPS):
            given = documents.batch(names[step], names[step + 1])
            yield step, [blank(spec) if engine.rank and step % 2 else given, documents.batch("image")]

    def after_step(report):
        losses.append((report.metrics["total"], report.metrics["grad_norm"]))
        watch.after(report.step + 1, engine, None)

    watch.after(0, engine, None)
    settings = TrainingConfig(steps=STEPS, learning_rate=3e-3, warmup_fraction=0)
    train(engine, objective, batches(), settings, sum_over_ranks=collectives.all_reduce_sum, after_step=after_step)
    return engine.weights(), losses, torch.rand(3)


def same(plain, looked_at):
    assert plain[1] == looked_at[1], "losses and gradient norms, to the bit"
    assert plain[0].keys() == looked_at[0].keys()
    assert all(torch.equal(weight, looked_at[0][name]) for name, weight in plain[0].items())
    assert torch.equal(plain[2], looked_at[2]), "random numbers were drawn"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("model"))
    tiny_model(path, "qwen2_5_vl")
    return path


def test_training_is_the_same_to_the_bit_whether_looked_at_or_not(folder: str, tmp_path) -> None:
    same(*(trained(folder, str(tmp_path), None, looking) for looking in (False, True)))
    moments = read_moments(str(tmp_path))
    assert [moment.step for moment in moments] == [0, 1, 2, 4]
    first, last = moments[0], moments[-1]
    assert len(first.images) == 2 and len(first.passages) == 2
    for before, after in zip(first.images, last.images, strict=True):
        assert np.array_equal(before.original, after.original) and np.array_equal(before.seen, after.seen)
        assert not np.array_equal(before.rebuilt, after.rebuilt)
    for step in (0, 1, 2, 4):
        Image.open(io.BytesIO(storage.read_bytes(f"{tmp_path}/reconstructions/step_{step:08d}.png"))).verify()


@pytest.mark.parametrize("stage", [0, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_so_it_is_on_two_ranks(folder: str, tmp_path, stage: int) -> None:
    """Of which one has no image in some steps, and both take part in every look."""
    same(*(on_ranks(trained, 2, folder, str(tmp_path), stage, looking) for looking in (False, True)))
    assert [moment.step for moment in read_moments(str(tmp_path))] == [0, 1, 2, 4]


def test_moments_are_the_start_the_end_and_its_halves() -> None:
    assert moments_of(200, 5) == [0, 25, 50, 100, 200]
    assert moments_of(3, 5) == [0, 1, 2, 3] and moments_of(7, 2) == [0, 7] and moments_of(7, 0) == []


def moment(step: int, right: int) -> Moment:
    pixels = np.full((30, 40, 3), 40 * (step + 1), np.uint8)
    words = [Word(f" w{n}", ((f" w{n}" if n < right else " other", 0.5),)) for n in range(5)]
    return Moment(step, [RebuiltImage(pixels, pixels, pixels)], [[Word("So"), *words, Word(" äé\n漢")]])


def test_a_moment_comes_back_from_storage_as_it_was() -> None:
    given = moment(3, 2)
    again = Moment.from_bytes(given.to_bytes())
    assert again.passages == given.passages and again.step == 3 and again.right == 2
    assert np.array_equal(again.images[0].rebuilt, given.images[0].rebuilt)


def blue(png: bytes) -> int:
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    return int((pixels[..., 2] > pixels[..., 0] + 90).sum())


def test_right_guesses_are_marked() -> None:
    none, some, all_ = (blue(draw_moment(moment(1, right), 4)) for right in (0, 2, 5))
    assert none == 0 and 2 * some < all_ < 3 * some
    assert blue(draw_development([moment(0, 0), moment(4, 0)])) == 0
    assert blue(draw_development([moment(0, 0), moment(4, 3)])) > 50


@pytest.mark.parametrize("half", ["images", "passages"])
def test_a_half_alone_is_drawn(half: str) -> None:
    halves = [
        Moment(step, **{"images": [], "passages": []} | {half: getattr(moment(step, 1), half)}) for step in (0, 4)
    ]
    for data in (draw_moment(halves[0], 4), draw_development(halves)):
        assert min(Image.open(io.BytesIO(data)).size) > 80


def rows_looked_at(monkeypatch: pytest.MonkeyPatch, rank: int, ranks: int, **settings) -> list[int]:
    """Of a corpus of 40 rows, by a worker that makes its streams."""
    config = PretrainConfig(rows_per_step=2, steps=8, **settings)
    costs = np.arange(1.0, 41.0)
    monkeypatch.setattr(row_streams, "read_table", lambda uri: {"cost_flops": pa.array(costs)})
    monkeypatch.setattr(row_streams, "make_batch", lambda address, **_: address["row"])
    monkeypatch.setattr(row_streams, "from_bytes", lambda row: row)
    job = {"config": config, "index": "", "files": ["a"], "rows_per_file": [40], "rows_per_group": 1}
    job |= {"cluster": ClusterConfig(), "tokenizer": "", "uri": ""}
    worker = SimpleNamespace(rank=rank, world_size=ranks)
    watch = row_streams.training_over_rows(worker, job, None, None).watch.__self__
    return [read() for read in watch.rows]


def test_the_rows_are_held_out_ones_and_the_same_on_any_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = {"validation_fraction": 0.2, "validate_every_steps": 4}
    rows = rows_looked_at(monkeypatch, 0, 1, **held_out)
    _, kept_back = hold_out(40, 0.2, 2, (0,))
    assert len(set(rows)) == 4 and set(rows) <= set(kept_back.tolist())
    assert rows == rows_looked_at(monkeypatch, 0, 2, **held_out) == rows_looked_at(monkeypatch, 1, 2, **held_out)
    assert set(rows) != set(rows_looked_at(monkeypatch, 0, 1, seed=1, **held_out)), "drawn by the seed"


def test_without_validation_they_are_the_first_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    first = row_plan(np.arange(1.0, 41.0), 2, range(2), 0, 1, seed=0)
    assert rows_looked_at(monkeypatch, 0, 2) == [address["row"] for address in first]


def test_one_moment_is_refused() -> None:
    with pytest.raises(ValueError, match="reconstructions=1"):
        PretrainConfig(reconstructions=1)
