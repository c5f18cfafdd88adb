"""The mean of models, against one worked out by hand and by transformers' own reading of the folders."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moca_core import averaging
from moca_core.attention import attention_of, set_attention
from moca_core.averaging import average_models
from moca_core.backbone import load_backbone, save_backbone
from moca_core.folder import PROCESSOR_FILES


def write(folder: Path, weights: dict[str, torch.Tensor]) -> str:
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"of": folder.name}))
    return str(folder)


def model(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Weights of all ranks, more elements than a block of these tests holds, and an empty one."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"b": (7, 5), "a": (3,), "scale": (), "c": (2, 3, 4), "none": (0, 4)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(averaging, "BLOCK_ELEMENTS", 8)


def test_every_weight_is_the_sum_of_shares(tmp_path):
    models = [model(seed) for seed in range(3)]
    folders = [write(tmp_path / str(n), weights) for n, weights in enumerate(models)]
    average_models(folders, [0.5, 0.2, 0.3], str(tmp_path / "out"))
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name in models[0]:
        by_hand = 0.5 * models[0][name] + 0.2 * models[1][name] + 0.3 * models[2][name]
        torch.testing.assert_close(found[name], by_hand)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"of": "0"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_the_mean_of_equal_models_is_that_model_to_the_bit(tmp_path, dtype, count):
    """Also minus zero, numbers near the smallest and the largest, and where the shares are no binary fractions."""
    weights = model(0, dtype)
    limits = torch.finfo(dtype)
    weights["b"].view(-1)[:4] = torch.tensor([-0.0, limits.smallest_normal / 2, limits.max, limits.min])
    folders = [write(tmp_path / str(n), weights) for n in range(count)]
    average_models(folders, [1 / count] * count, str(tmp_path / "out"))
    before, after = (Path(folder, "model.safetensors").read_bytes() for folder in (folders[0], tmp_path / "out"))
    assert before == after


def test_a_share_of_one_gives_that_model_alone(tmp_path):
    folders = [write(tmp_path / str(n), model(n)) for n in range(3)]
    average_models(folders, [0, 0, 1], str(tmp_path / "out"))
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], weight) for name, weight in model(2).items())


def test_models_of_other_precision_and_files_are_averaged_in_those_of_the_first(tmp_path):
    """A checkpoint of the Hub is bfloat16 in several files; what training writes is float32."""
    trained, base = model(0), model(1, torch.bfloat16)
    folders = [write(tmp_path / "trained", trained), write(tmp_path / "base", base)]
    files = {"one.safetensors": ["a", "c"], "two.safetensors": ["b", "scale", "none"]}
    for file, names in files.items():
        save_file({name: base[name] for name in names}, tmp_path / "base" / file)
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "base" / "consolidated.safetensors")
    places = {name: file for file, names in files.items() for name in names}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    average_models(folders, [0.75, 0.25], str(tmp_path / "out"))
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in trained.items():
        torch.testing.assert_close(found[name], 0.75 * weight + 0.25 * base[name].float())
    average_models(folders[::-1], [0.25, 0.75], str(tmp_path / "back"))
    assert {path.name for path in (tmp_path / "back").glob("*model*")} == {"model.safetensors.index.json"}
    for file, names in files.items():
        there = load_file(tmp_path / "back" / file)
        assert all(torch.equal(there[name], found[name].bfloat16()) for name in names) and there.keys() == set(names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": torch.zeros(5, 7)}, r"b is \[7, 5\] in .*/0 and \[5, 7\] in .*/1"),
        ({"d": torch.zeros(1)}, r"only the first has \[\], only the second \['d'\]"),
        ({"a": None}, r"only the first has \['a'\], only the second \[\]"),
        ({"a": torch.zeros(3, dtype=torch.int64)}, "a is I64; a mean needs one of F64, F32, F16, BF16"),
    ],
)
def test_models_that_do_not_match_are_refused_by_name(tmp_path, change, message):
    other = {name: weight for name, weight in (model(1) | change).items() if weight is not None}
    folders = [write(tmp_path / "0", model(0)), write(tmp_path / "1", other)]
    with pytest.raises(ValueError, match=message):
        average_models(folders, [0.5, 0.5], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shares", [[0.5, 0.4], [1.5, -0.5], [1.0], [0.5, 0.25, 0.25], [float("nan"), 0.5]])
def test_shares_that_are_none_are_refused(tmp_path, shares):
    folders = [write(tmp_path / str(n), model(n)) for n in range(2)]
    with pytest.raises(ValueError, match=re.escape(f"shares={shares} of 2 models")):
        average_models(folders, shares, str(tmp_path / "out"))


def test_a_folder_without_weights_is_refused(tmp_path):
    given = write(tmp_path / "given", model(0))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds neither model\.safetensors nor"):
        average_models([given, str(tmp_path / "empty")], [0.5, 0.5], str(tmp_path / "out"))


def test_a_real_folder_stays_whole_and_attends_as_the_first(any_folder, tmp_path):
    """As `load_backbone` reads it, strictly; the trained model declares another attention than the base."""
    base = load_backbone(any_folder)
    trained = load_backbone(any_folder)
    set_attention(trained, "bidirectional")
    with torch.no_grad():
        for number, parameter in enumerate(trained.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    given = str(tmp_path / "given")
    shutil.copytree(any_folder, given)
    save_backbone(trained, given)
    average_models([given, any_folder], [0.25, 0.75], str(tmp_path / "out"))
    mean = load_backbone(str(tmp_path / "out"))
    assert attention_of(mean) == "bidirectional" and attention_of(base) == "causal"
    for name, weight in mean.state_dict().items():
        torch.testing.assert_close(weight, 0.25 * trained.state_dict()[name] + 0.75 * base.state_dict()[name])
    kept = [name for name in PROCESSOR_FILES if Path(any_folder, name).exists()]
    assert kept and all((tmp_path / "out" / name).read_bytes() == Path(any_folder, name).read_bytes() for name in kept)
