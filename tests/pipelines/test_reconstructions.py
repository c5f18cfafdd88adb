"""Looking at pre-training changes nothing of it, and what was seen is kept and drawn."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from cluster import collectives, storage
from cluster.engine import EngineConfig, open_engine
from cluster.torch_engine import TorchEngine
from moca_core.attention import set_attention
from moca_core.backbone import load_backbone
from moca_core.data.masking import blank
from moca_core.objective.pretraining import MaskedModelling
from moca_core.reconstruction import RebuiltImage, Word
from moca_core.spec import read_spec
from pipelines.pictures.reconstructions import Moment, draw_development, draw_moment, read_moments
from pipelines.training.config import TrainingConfig
from pipelines.training.loop import train
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
