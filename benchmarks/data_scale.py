"""How memory and time of the data steps grow with the corpus: flat and linear, or not.

    python benchmarks/data_scale.py [--documents 1000 10000 100000]

Documents of 1 to 400 words drawn from the documentation that the installation holds (Zipf's law comes with it), every fifth with a figure,
and half as many text pairs, written as Parquet of the MoCa layout and JSON lines. Then corpus, pairs, clean and pack run as the pipeline
runs them, and the masked stream is read to its end. Printed per step: documents per second, and the peak memory of all
processes of the run (PSS, shared memory counted once), with its ratio to the smallest corpus. PASS when no step needs over 1.2 times
that, and the rate of no step falls below half of what it is for the corpus before (small ones pay the start of Ray).
"""

import argparse
import gc
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cluster.session import ClusterConfig, connect
from moca_core import bootstrap
from moca_core.data.duplicates import CleanRules
from moca_core.sources.builtin import documents as builtin
from moca_core.sources.moca import PLACEHOLDER
from moca_core.spec import BackboneSpec, read_spec
from pipelines.runner.record import Artifact
from pipelines.runner.step import Context, Execution
from pipelines.sources import Source
from pipelines.steps import clean, corpus, pack, pairs, pretrain
from pipelines.tables import read_table
from pipelines.training import row_streams
from pipelines.training.plan import row_plan
from pipelines.training.stream import open_stream

FILES = 16  # of every corpus, so that as many tasks run side by side; files grow, as they do in public sets
WINDOW = 250  # documents packed together, so that the smallest corpus has some windows too
FIGURES = 5  # every so many documents one
FLAT, LINEAR = 1.2, 0.5
STEPS = ("corpus", "pairs", "clean", "pack", "stream")


class Silent:
    """A tracking run that keeps nothing."""

    def log_metrics(self, *_, **__) -> None: ...

    def log_dataset(self, *_, **__) -> None: ...

    def log_artifact(self, *_, **__) -> None: ...


class PeakMemory:
    """The most memory that this process and all below it held, sampled: PSS, so that shared pages count once."""

    def __enter__(self) -> "PeakMemory":
        self.peak_bytes, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            self._sample()

    def _sample(self) -> None:
        family = [psutil.Process(), *psutil.Process().children(recursive=True)]
        self.peak_bytes = max(self.peak_bytes, sum(map(pss_bytes, family)))


def pss_bytes(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied, FileNotFoundError):
        return 0  # it ended while we looked


def real_words() -> list[str]:
    units = builtin.list_units()[:4]
    texts = (s.text for unit in units for d in builtin.read_unit(None, unit) for s in d.content if s.text)
    return " ".join(texts).split()


def write_inputs(folder: Path, count: int, words: list[str]) -> None:
    """`count` documents and half as many pairs, a file at a time."""
    rng = np.random.default_rng(0)
    for kind in ("documents", "pairs"):
        (folder / kind).mkdir(parents=True)
    schema = pa.schema([("text", pa.string()), ("images", pa.list_(pa.binary()))])
    for start in range(0, count, -(-count // FILES)):
        numbers = range(start, min(count, start + -(-count // FILES)))
        rows = [document(number, words, rng) for number in numbers]
        table = pa.Table.from_pylist(rows, schema=schema)
        pq.write_table(table, folder / "documents" / f"part-{start:08d}.parquet", row_group_size=500)
        with open(folder / "pairs" / f"part-{start:08d}.jsonl", "w") as file:
            for number in numbers[::2]:
                pair = {"query": f"{number} {passage(words, rng, 12)}", "positive": passage(words, rng, 120)}
                file.write(json.dumps(pair) + "\n")
    held_out = [
        {"qry_text": f"held out {n}", "tgt_text": [passage(words, rng, 60), passage(words, rng, 60)]} for n in range(50)
    ]
    rows = [row | {"qry_img_path": "", "tgt_img_path": ["", ""]} for row in held_out]
    pq.write_table(pa.Table.from_pylist(rows), folder / "held_out.parquet")


def passage(words: list[str], rng: np.random.Generator, most: int) -> str:
    start, length = int(rng.integers(len(words) - most)), int(rng.integers(1, most + 1))
    return " ".join(words[start : start + length])


def document(number: int, words: list[str], rng: np.random.Generator) -> dict:
    text = f"Document {number}.\n\n{passage(words, rng, 400)}"
    if number % FIGURES:
        return {"text": text, "images": []}
    return {"text": f"{text}\n{PLACEHOLDER}", "images": [figure(rng)]}


def figure(rng: np.random.Generator) -> bytes:
    small = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize((320, 240), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def measure(count: int, folder: Path) -> dict[str, dict[str, float]]:
    """{step: {"peak_bytes", "seconds"}} of one corpus."""
    words = real_words()
    write_inputs(folder / "raw", count, words)
    model = folder / "model"
    bootstrap.create(str(model), [" ".join(words[:200_000])], bootstrap.TinyConfig(max_image_px=224 * 224), seed=0)
    spec = read_spec(str(model))
    connect(ClusterConfig())
    execution = Execution(ClusterConfig(), 10, 50)
    artifacts = {"base": Artifact(str(model), {"spec": spec.to_dict(), "tokenizer": "tokenizer.json"})}
    configs = {
        "corpus": (corpus, corpus.CorpusConfig((Source("moca", str(folder / "raw/documents")),))),
        "pairs": (
            pairs,
            pairs.PairsConfig(
                (Source("jsonl", str(folder / "raw/pairs")),), (Source("mmeb", str(folder / "raw/held_out.parquet")),)
            ),
        ),
        "clean": (clean, CleanRules()),
        "pack": (pack, pack.PackConfig(max_tokens=1024, row_tokens=4096, window=WINDOW)),
    }
    figures = {}
    for name, (step, config) in configs.items():
        uri = str(folder / "root" / name)
        context = Context(name, config, artifacts, uri, name, execution, Silent(), "", lambda message: None)
        figures[name], result = timed(lambda step=step, context=context: step.run(context))
        artifacts[name] = Artifact(uri, result)
    figures["stream"], tokens = timed(lambda: read_stream(artifacts["pack"], spec))
    packed = artifacts["pack"].result
    assert tokens == packed["tokens"], f"{tokens} tokens in the stream, {packed['tokens']} in the packs"
    assert sum(share["documents"] for share in packed["mixture"]["moca raw/documents"].values()) == count
    return figures


def timed(run):
    gc.collect()
    with PeakMemory() as memory:
        started = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - started
    return {"peak_bytes": memory.peak_bytes, "seconds": seconds}, result


def read_stream(packed: Artifact, spec: BackboneSpec) -> int:
    """One epoch of masked rows, as a training worker reads it; the number of tokens."""
    from functools import partial

    files = packed.result["files"]
    costs = read_table(packed.path(packed.result["index"]))["cost_flops"].to_numpy()
    rows_per_step = 1
    plan = row_plan(costs, rows_per_step, range(len(costs)), 0, 1, seed=0)
    make = partial(
        row_streams.make_batch,
        config=replace(pretrain.PretrainConfig(), rows_per_step=rows_per_step),
        spec=spec,
        files=[packed.path(file) for file, _ in files],
        rows_per_file=[rows for _, rows in files],
        rows_per_group=packed.result["rows_per_group"],
    )
    return sum(len(batch.stream.input_ids) for _, batches in open_stream(plan, make, tasks=2) for batch in batches)


def report(counts: list[int], figures: list[dict[str, dict[str, float]]]) -> bool:
    print(f"{'documents':>10}  {'step':<7} {'seconds':>8} {'documents/s':>12} {'peak MiB':>9} {'to smallest':>12}")
    passed = True
    for k, (count, figure) in enumerate(zip(counts, figures, strict=True)):
        for step in STEPS:
            now, smallest = figure[step], figures[0][step]
            ratio = now["peak_bytes"] / smallest["peak_bytes"]
            rate = count / now["seconds"]
            slower = k > 0 and rate < LINEAR * counts[k - 1] / figures[k - 1][step]["seconds"]
            passed &= ratio <= FLAT and not slower
            print(
                f"{count:>10,}  {step:<7} {now['seconds']:>8.1f} {rate:>12,.0f} {now['peak_bytes'] / 2**20:>9,.0f} {ratio:>12.2f}"
            )
    print(f"{'PASS' if passed else 'FAIL'}: peak at most {FLAT} of the smallest corpus, time linear")
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--folder", help="where to work (default: a temporary folder)")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            print(json.dumps(measure(options.documents[0], Path(folder))))
        return 0
    figures = []
    for count in options.documents:  # a fresh process for each: memory of the one before must not count
        command = [sys.executable, __file__, "--one", "--documents", str(count)]
        command += ["--folder", options.folder] if options.folder else []
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "PYTHONPATH": "."}
        )
        figures.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"measured {count:,} documents", file=sys.stderr, flush=True)
    return 0 if report(options.documents, figures) else 1


if __name__ == "__main__":
    sys.exit(main())
