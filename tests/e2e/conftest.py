"""One real run of the whole pipeline, short: real documents, broken ones among them, and a training worker killed in the middle."""

import io
import os
import re
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from pipelines import full

ROOT = Path(__file__).parents[2]
KICAD = ROOT.parent / "shared" / "data" / "kicad"
PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"
OF_A_USER = ("RAY_ADDRESS", "MOCA_ROOT", "MLFLOW_TRACKING_URI")  # variables that would send a run elsewhere


def png(width: int = 60, height: int = 60, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def huge_header() -> bytes:
    """A small, well-formed PNG file whose header claims 20,000 x 20,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def broken_corpus(folder: Path) -> None:
    """The MoCa layout with one good row and the five classics."""
    good = png()
    rows = [
        {"text": f"a good one {PLACEHOLDER} with a figure", "images": [good]},
        {"text": f"truncated {PLACEHOLDER}", "images": [good[: len(good) // 2]]},
        {"text": f"text named .png {PLACEHOLDER}", "images": [b"this is no image at all"]},
        {"text": "", "images": []},
        {"text": f"huge {PLACEHOLDER}", "images": [huge_header()]},
        {"text": f"two {PLACEHOLDER} and one {PLACEHOLDER}", "images": [good]},
    ]
    folder.mkdir(parents=True)
    schema = pa.schema([("text", pa.string()), ("images", pa.list_(pa.binary()))])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "part.parquet")


REJECTED = {"image_truncated": 1, "not_an_image": 1, "empty": 1, "image_too_many_pixels": 1, "too_few_images": 1}


def sources(folder: Path) -> dict:
    """The KiCad manuals where they lie beside the repository; elsewhere the built-in ones. Broken documents in both cases."""
    broken_corpus(folder / "broken")
    broken = {"layout": "moca", "path": str(folder / "broken")}
    if not KICAD.exists():
        builtin = [{"layout": "builtin"}]
        return {"corpus": [*builtin, broken], "train": builtin, "evaluate": builtin}
    return {
        "corpus": [{"layout": "obelics", "path": str(KICAD / "interleaved")}, broken],
        "train": [{"layout": "mmeb", "path": str(KICAD / "mmeb_train.parquet")}],
        "evaluate": [{"layout": "mmeb", "path": str(KICAD / "mmeb_eval.parquet")}],
    }


def recipe_file(folder: Path) -> Path:
    given = sources(folder)
    tiny = {"text_hidden": 64, "text_layers": 2, "text_heads": 2, "text_kv_heads": 1, "text_intermediate": 128}
    tiny |= {"vision_hidden": 32, "vision_layers": 2, "vision_heads": 2, "vision_intermediate": 64, "vocab_size": 1024}
    recipe = {
        "recipe": "demo",
        "corpus": {"sources": given["corpus"]},
        "pack": {"max_tokens": 512},
        "base": {"tiny": {**tiny, "max_image_px": 112 * 112}, "steps": 6, "max_tokens": 512},
        "pretrain": {"steps": 24},
        "pairs": {"train": given["train"], "evaluate": given["evaluate"]},
        "finetune": {"steps": 4, "batch_size": 8, "max_tokens": 128},
        "evaluate": {"max_tokens": 128},
        "export": {"name": "short", "max_tokens": 512},
        "tracking": {"log_every_steps": 2, "checkpoint_every_steps": 4},
        "cluster": {"data_tasks_per_worker": 1},  # every process of them starts for seconds
    }
    path = folder / "short.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@dataclass
class Run:
    """A finished command: its exit code, all it printed, and the pid of the worker that was killed."""

    code: int
    output: str
    killed: int | None = None


def pipeline(*arguments: str, kill_at: str | None = None) -> Run:
    """Runs the command; `kill_at` is a pattern of the line after which the worker that printed it gets a SIGKILL."""
    environment = {name: value for name, value in os.environ.items() if name not in OF_A_USER}
    command = [sys.executable, "pipelines/full.py", *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines, killed = [], None
    for line in process.stdout:
        lines.append(line)
        if kill_at and killed is None and re.search(kill_at, line):
            killed = int(re.search(r"pid=(\d+)", line)[1])
            os.kill(killed, signal.SIGKILL)
    return Run(process.wait(), "".join(lines), killed)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """The same command inside this process, which has its imports behind it."""
    for name in OF_A_USER:
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str) -> Run:
        code = full.main(list(arguments))
        printed = capsys.readouterr()
        return Run(code, printed.out + printed.err)

    return run


@dataclass
class Finished:
    root: Path
    recipe: Path
    run: Run


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Finished:
    folder = tmp_path_factory.mktemp("pipeline")
    recipe = recipe_file(folder)
    root = folder / "root"
    run = pipeline("--recipe", str(recipe), "--root", str(root), kill_at=r"RayTrainWorker.*pretrain \[.* 10/24")
    return Finished(root, recipe, run)
