"""Steps of the data path as the runner runs them, and small data of which every row is known."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster import storage
from cluster.batch import Pool
from cluster.session import ClusterConfig
from moca_core.data.schema import table_to_documents
from moca_core.types import Document
from pipelines.runner.record import Artifact
from pipelines.runner.step import Context, Execution, Step
from pipelines.tables import read_table

PROSE = (
    "a board is a sheet of copper with holes in it and every hole joins two layers of the same net so that current "
    "flows from the regulator to the load without heating the trace more than the rules of the design allow while "
    "the editor draws zones around pads and fills them when the check has passed and a schematic names parts and wires"
)
WORDS = PROSE.split()


@dataclass
class Books:
    """Stands for an MLflow run: what a step reported."""

    run_id: str = "none"
    metrics: dict[str, float] = field(default_factory=dict)
    datasets: list[tuple] = field(default_factory=list)
    artifacts: list[str] = field(default_factory=list)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        json.dumps(metrics, allow_nan=False)
        self.metrics |= metrics

    def log_dataset(self, *about: str) -> None:
        self.datasets.append(about)

    def log_artifact(self, path: str) -> None:
        self.artifacts.append(path)


def run_step(
    step: Step,
    uri: str,
    books: Books | None = None,
    said: list[str] | None = None,
    cluster: ClusterConfig | None = None,
    **inputs: Artifact,
) -> Artifact:
    """The step's result below `uri`, as the runner would keep it: through JSON."""
    assert set(inputs) == set(step.needs)
    execution = Execution(cluster or ClusterConfig(), log_every_steps=10, checkpoint_every_steps=50)
    context = Context(
        step=step.name,
        config=step.config,
        inputs=inputs,
        uri=uri,
        fingerprint="0" * 16,
        execution=execution,
        run=books if books is not None else Books(),
        tracking_uri="",
        say=(said if said is not None else []).append,
    )
    result = json.loads(json.dumps(step.run(context), allow_nan=False))
    for name in step.leftovers:
        storage.delete(storage.join(uri, name))
    return Artifact(uri, result)


def units_here(fn: Callable, count: int, *, state_uri: str, say: Callable, pool: Pool | None = None) -> list[dict]:
    """What `run_units` returns, by this process alone."""
    unit = fn() if pool else fn
    return [json.loads(json.dumps(unit(number), allow_nan=False)) for number in range(count)]


def documents_of(corpus: Artifact) -> list[list[Document]]:
    """The documents that count, of every part, in order."""
    used = [0] * corpus.result["parts"]
    for group in read_table(corpus.path("groups.parquet")).to_pylist():
        used[group["part"]] += group["documents"]
    tables = [read_table(corpus.path(f"documents/part-{part:05d}.parquet")) for part in range(len(used))]
    return [list(table_to_documents(table.slice(0, rows))) for table, rows in zip(tables, used, strict=True)]


def rejected_of(artifact: Artifact) -> list[dict[str, str]]:
    names = [name for name, _ in storage.list_files(artifact.uri) if name.startswith("rejected/")]
    return [row for name in names for row in read_table(artifact.path(name)).to_pylist()]


def files_of(uri: str, *folders: str) -> dict[str, bytes]:
    """{name: content} of the artifact's own files below these folders, or with these names."""
    found = {name: storage.read_bytes(storage.join(uri, name)) for name, _ in storage.list_files(uri)}
    return {name: data for name, data in found.items() if name.split("/")[0] in folders}


def words(count: int, seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, count))


def png(seed: int, width: int = 60, height: int = 60) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


LOGO, HELD_OUT = png(10_001), png(10_002)
SCHEMA = pa.schema([("texts", pa.list_(pa.string())), ("images", pa.list_(pa.binary()))])
ROWS_PER_FILE = 12
REASONS = {
    "not_an_image": ([f"see below {words(5, 1)}", None], [None, b"this is no image"]),
    "image_truncated": ([f"see above {words(5, 2)}", None], [None, png(1)[:-200]]),
    "image_missing": ([f"nothing here {words(5, 3)}", None], [None, b""]),
    "empty": (["  "], [None]),
    "text_too_short": (["too short"], [None]),
    "texts_images_mismatch": (["one", "two"], [None]),
    "repeated_lines": (["the same line again\n" * 80], [None]),
}


def write_web(folder: Path, files: int, broken: bool = True) -> int:
    """OBELICS files of known rows, every one with a number of its own in its text: good ones, one broken in every way, a copy
    of the first row of the first file, one with an image that an evaluation task holds, one with a logo. The number of rows."""
    folder.mkdir(parents=True)
    for number in range(files):
        rows = []
        for place in range(ROWS_PER_FILE):
            seed = number * ROWS_PER_FILE + place
            texts, images = (
                [f"document {seed} {words(40, seed)}", None, words(30, seed + 5000)],
                [None, png(seed), None],
            )
            if place == 9:
                texts[1:1], images[1:1] = [None], [LOGO]
            if place == 10:
                texts, images = [*texts, None], [*images, HELD_OUT]
            if place == 11:
                texts, images = [f"document 0 {words(40, 0)}", None, words(30, 5000)], [None, png(0), None]
            rows.append((texts, images))
        if broken:
            rows[3] = REASONS[list(REASONS)[number % len(REASONS)]]
        columns = {name: [row[n] for row in rows] for n, name in enumerate(("texts", "images"))}
        pq.write_table(pa.table(columns, schema=SCHEMA), folder / f"web-{number:02d}.parquet", row_group_size=5)
    return files * ROWS_PER_FILE


def write_texts(folder: Path, lines: int, files: int = 1) -> None:
    """JSON lines of long texts without images, one of them broken."""
    folder.mkdir(parents=True)
    for number in range(files):
        rows = [
            json.dumps({"text": f"line {number} {n}\n\n{words(90, n + 900)}\n\n{words(60, n)}"}) for n in range(lines)
        ]
        rows[1] = '{"text": "cut'
        (folder / f"lines-{number:02d}.jsonl").write_text("\n".join(rows) + "\n")


def write_pairs(folder: Path, files: int = 2, rows: int = 30) -> None:
    """Triplets of two tasks, and an MMEB task that holds one image and one pair of the training set."""
    (folder / "train").mkdir(parents=True)
    for number in range(files):
        given = [
            {"query": f"which {n} {words(4, n)}", "positive": f"that {n} {words(9, n)}", "negatives": [words(7, n + 1)]}
            for n in range(number * rows, (number + 1) * rows)
        ]
        given[2] = {"query": "a query", "positive": []}
        (folder / "train" / f"t{number % 2}.jsonl").write_text("\n".join(map(json.dumps, given)) + "\n")
    (folder / "evaluate").mkdir()
    (folder / "evaluate" / "held_out.png").write_bytes(HELD_OUT)
    asked = {
        "qry_text": [f"which 5 {words(4, 5)}", "which picture"],
        "qry_img_path": ["", ""],
        "tgt_text": [[f"that 5 {words(9, 5)}"], ["", ""]],
        "tgt_img_path": [[""], ["held_out.png", "held_out.png"]],
    }
    pq.write_table(pa.table(asked), folder / "evaluate" / "task.parquet")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """What `pack` needs of the step `base`: a tokenizer and a spec."""
    from moca_core.bootstrap import TinyConfig, create
    from moca_core.spec import read_spec

    folder = str(tmp_path_factory.mktemp("base"))
    sizes = {"vocab_size": 600, "text_hidden": 32, "text_layers": 1, "text_heads": 2, "text_kv_heads": 1}
    sizes |= {
        "text_intermediate": 32,
        "vision_hidden": 32,
        "vision_layers": 1,
        "vision_heads": 2,
        "vision_intermediate": 32,
    }
    create(folder, [" ".join(WORDS)] * 20, TinyConfig(**sizes, max_image_px=112 * 112), seed=0)
    return Artifact(folder, {"tokenizer": "tokenizer.json", "spec": read_spec(folder).to_dict()})
