"""GradCache: memory and time of contrastive batches from 64 to 4096 pairs, against the plain step and against sentence-transformers.

    python benchmarks/gradcache.py [--pairs 64 256 1024 4096] [--tokens 2048]

The same weights, the same pairs of real texts (what a function does -> its documentation), fp32, one thread, the same number of tokens
at a time. Every figure comes from a process of its own. Memory is what the step adds to the process, data and gradients included.

    plain                  one packed forward of everything
    gradcache              ours: moca_core/gradcache.py over packed parts
    sentence-transformers  CachedMultipleNegativesRankingLoss on the exported folder, `mini_batch_num_tokens` the same

Printed: memory and time per pair by batch size, the ratios, and the largest difference between the gradients of the three.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch

from moca_core import bootstrap
from moca_core.attention import set_attention
from moca_core.backbone import load_backbone, save_backbone
from moca_core.data.pairs import collate_pairs
from moca_core.data.render import Renderer, load_tokenizer
from moca_core.export import export_model
from moca_core.folder import copy_processor
from moca_core.gradcache import cached_step
from moca_core.objective.contrastive import Contrastive
from moca_core.objective.contrastive_config import ContrastiveConfig
from moca_core.sources.builtin.docs import PACKAGES, entries
from moca_core.spec import read_spec
from moca_core.types import Pair, PairBatch, Segment

TEMPERATURE = 0.05
MAX_TOKENS = 192
METHODS = ("plain", "gradcache", "sentence-transformers")
OTHERS_UP_TO = 256  # pairs: beyond, the plain step takes gigabytes and the other library many minutes
REPEATS = 3  # passes over the smallest batch, of which the best counts
SIZES = bootstrap.TinyConfig(text_hidden=256, text_layers=6, text_intermediate=768)


def real_pairs(count: int) -> list[Pair]:
    """Different questions with different answers."""
    texts: dict[str, str] = {}
    for entry in (entry for package in PACKAGES for entry in entries(package)):
        first, *rest = entry.body.split("\n")
        texts.setdefault(entry.query, first)
        if rest:
            texts.setdefault(first, " ".join(rest))
    unique = {answer: query for query, answer in texts.items()}
    if len(unique) < count:
        raise ValueError(f"--pairs {count}: the installed documentation has {len(unique)}")
    return [Pair("docs", (Segment(text=q),), ((Segment(text=a),),)) for a, q in list(unique.items())[:count]]


def write_models(folder: Path) -> None:
    """A model of random weights as a training stage leaves it, and its export."""
    texts = [segment.text for pair in real_pairs(1000) for segment in (*pair.query, *pair.positives[0])]
    start, trained = str(folder / "start"), str(folder / "trained")
    bootstrap.create(start, texts, SIZES, seed=0)
    model = load_backbone(start)
    set_attention(model, "bidirectional")
    save_backbone(model, trained)
    copy_processor(start, trained)
    export_model(trained, str(folder / "export"), read_spec(trained), max_tokens=MAX_TOKENS, dtype=torch.float32)


class Ours:
    """A step of this project, plain or by GradCache."""

    def __init__(self, folder: Path, count: int, tokens: int) -> None:
        spec = read_spec(str(folder / "trained"))
        renderer = Renderer(load_tokenizer(str(folder / "trained" / "tokenizer.json")), spec, MAX_TOKENS)
        self.batch: PairBatch = collate_pairs(real_pairs(count), renderer, num_negatives=0, sources=["docs"], key=(0,))
        config = ContrastiveConfig(temperature=TEMPERATURE)
        self.objective = Contrastive(load_backbone(str(folder / "trained")), spec, config, tasks=["docs"])
        self.module, self.budget_tokens = self.objective.encoder.backbone, tokens
        self.tokens = len(self.batch.stream.input_ids)

    def step(self) -> None:
        def loss_of(terms):
            return terms["contrastive"].sum / terms["contrastive"].count

        if not self.budget_tokens:
            loss_of(self.objective(self.batch)).backward()
            return
        cached_step(
            self.objective,
            self.batch,
            self.objective.chunks_needed(self.batch, self.budget_tokens),
            forward=self.objective,
            backward=lambda loss, last: loss.backward(),
            loss_of=loss_of,
        )


class SentenceTransformers:
    """The same step by sentence-transformers, from texts that are tokens already."""

    def __init__(self, folder: Path, count: int, tokens: int) -> None:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

        model = SentenceTransformer(str(folder / "export"), device="cpu").train()
        pairs = real_pairs(count)
        sides = [[pair.query[0].text for pair in pairs], [pair.positives[0][0].text for pair in pairs]]
        self.features = [model.preprocess(side) for side in sides]
        self.tokens = sum(int(side["attention_mask"].sum()) for side in self.features)
        self.loss = CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, mini_batch_num_tokens=tokens)
        self.module = model[0].model

    def step(self) -> None:
        self.loss([dict(side) for side in self.features], None).backward()


def measure(method: str, folder: Path, count: int, tokens: int) -> None:
    """One process: prints its figures, and leaves the gradient of its smallest batch."""
    torch.set_num_threads(1)
    made = (
        SentenceTransformers(folder, count, tokens)
        if method == "sentence-transformers"
        else Ours(folder, count, tokens if method == "gradcache" else 0)
    )
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before_bytes, times = psutil.Process().memory_info().rss, []
    for _ in range(REPEATS if count <= 256 else 1):
        made.module.zero_grad()
        started = time.perf_counter()
        made.step()
        times.append(time.perf_counter() - started)
    peak_bytes = peak_rss_bytes()
    gradient = torch.cat([p.grad.flatten() for _, p in sorted(trained(made.module).items())])
    np.save(folder / f"{method}-{count}.npy", gradient.numpy())
    print(json.dumps({"seconds": min(times), "bytes": peak_bytes - before_bytes, "tokens": made.tokens}))


def peak_rss_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def trained(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """What texts reach, by the names that both libraries share."""
    return {
        name.split("language_model.")[-1]: p
        for name, p in module.named_parameters()
        if p.grad is not None and p.grad.any()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[64, 256, 1024, 4096], help="batch sizes")
    parser.add_argument("--tokens", type=int, default=2048, help="in one forward pass of the cached methods")
    parser.add_argument("--child", nargs=2, metavar=("METHOD", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        measure(options.child[0], Path(options.child[1]), options.pairs[0], options.tokens)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder))
        report(Path(folder), options.pairs, options.tokens)


def run_child(method: str, folder: Path, count: int, tokens: int) -> dict:
    command = [sys.executable, __file__, "--pairs", f"{count}", "--tokens", f"{tokens}", "--child", method, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{method} with {count} pairs: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def report(folder: Path, sizes: list[int], tokens: int) -> None:
    figures: dict[tuple[str, int], dict] = {}
    print(f"{'pairs':>6} {'tokens':>8} {'method':<22} {'memory MiB':>10} {'ms a pair':>10}", flush=True)
    for count in sizes:
        for method in METHODS if count <= OTHERS_UP_TO else ["gradcache"]:
            found = figures[method, count] = run_child(method, folder, count, tokens)
            per_pair_ms = 1000 * found["seconds"] / count
            print(
                f"{count:>6} {found['tokens']:>8} {method:<22} {found['bytes'] / 2**20:>10.0f} {per_pair_ms:>10.2f}",
                flush=True,
            )
    for count in sizes:
        ours, theirs, plain = (figures.get((m, count)) for m in ("gradcache", "sentence-transformers", "plain"))
        if theirs and plain:
            slower, dearer = theirs["seconds"] / ours["seconds"], ours["seconds"] / plain["seconds"]
            line = f"{count:>6} pairs: sentence-transformers takes {slower:.2f} times as long as gradcache"
            print(f"{line}, which takes {dearer:.2f} times the plain step")
    smallest, largest = (figures["gradcache", size]["bytes"] for size in (sizes[0], sizes[-1]))
    print(f"memory of gradcache from {sizes[0]} to {sizes[-1]} pairs: {largest / smallest:.2f} times")
    reference = np.load(folder / f"gradcache-{sizes[0]}.npy")
    for method in ("plain", "sentence-transformers"):
        other = np.load(folder / f"{method}-{sizes[0]}.npy")
        assert other.shape == reference.shape, f"{method} trains {other.shape}, gradcache {reference.shape}"
        print(
            f"gradient of {method}: differs by {np.abs(other - reference).max():.1e}, largest {np.abs(reference).max():.1e}"
        )


if __name__ == "__main__":
    main()
