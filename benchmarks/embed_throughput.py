"""Embedding mixed pages and texts: this project's Embedder against sentence-transformers' `encode`, on one exported model.

    python benchmarks/embed_throughput.py [--model DIR] [--contents 192] [--rounds 3] [--threads 2] [--pages a4]

Pages and texts of the built-in corpus, half and half, as bytes of PNG and as strings: decoding, resizing, tokenizing and the model are all
in the time of both. Pages are of A4 at 150 dpi, or the small ones of the demo. Both have the same number of threads.
sentence-transformers gets each of several batch sizes and the best one counts; rounds alternate, the best of each counts. Without --model,
three exported models of random weights: the demo's shape, one of 10, and one of 80 million parameters.
Printed: contents per second by wall clock and by CPU time of the process (on a machine that others use, the latter is the fair one),
their ratios, and the vectors' lowest cosine and largest difference.
"""

import argparse
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from moca_core import bootstrap
from moca_core.attention import set_attention
from moca_core.backbone import load_backbone, save_backbone
from moca_core.embedder import Embedder
from moca_core.export import export_model
from moca_core.folder import copy_processor
from moca_core.sources.builtin import documents as builtin
from moca_core.spec import read_spec
from moca_core.types import Content, Segment

BATCH_SIZES = (1, 8, 32)
SHAPES = {
    "demo": bootstrap.TinyConfig(),
    "10M": bootstrap.TinyConfig(
        text_hidden=256,
        text_layers=8,
        text_heads=8,
        text_kv_heads=4,
        text_intermediate=768,
        vision_hidden=192,
        vision_layers=6,
        vision_heads=6,
        vision_intermediate=512,
        max_image_px=448 * 448,
    ),
    "80M": bootstrap.TinyConfig(
        text_hidden=640,
        text_layers=12,
        text_heads=10,
        text_kv_heads=5,
        text_intermediate=1920,
        vision_hidden=320,
        vision_layers=12,
        vision_heads=10,
        vision_intermediate=1280,
        max_image_px=448 * 448,
    ),
}


@dataclass
class Measured:
    """The best round: seconds by the clock and of the processor, and the vectors."""

    wall_s: float = float("inf")
    cpu_s: float = float("inf")
    vectors: np.ndarray | None = None

    def take(self, run: Callable[[], np.ndarray]) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self.vectors = run()
        self.wall_s = min(self.wall_s, time.perf_counter() - wall)
        self.cpu_s = min(self.cpu_s, time.process_time() - cpu)


def pages_and_texts(count: int, kind: str) -> list[Content]:
    """Every other one a page (its picture alone), every other one a text, lengths as uneven as they really are."""
    packages = [unit for unit in builtin.list_units() if unit["kind"] == "package"][:3]
    documents = [document.content for unit in packages for document in builtin.read_unit(None, unit)]
    pages = [content[0].image for content in documents if content[0].image is not None]
    texts = [content for content in documents if content[0].image is None][: count // 2]
    if kind == "a4":
        rng = np.random.default_rng(0)
        pages = [a4_page([pages[n] for n in rng.choice(len(pages), 30)]) for _ in texts]
    return [content for page, text in zip(pages, texts, strict=False) for content in ((Segment(image=page),), text)]


def a4_page(small: list[bytes]) -> bytes:
    """PNG of 1240 x 1754 pixels, A4 at 150 dots per inch as embed.py reads a PDF, full of the print of thirty small pages."""
    sheet = Image.new("RGB", (1240, 1754), "white")
    for number, page in enumerate(small):
        sheet.paste(Image.open(io.BytesIO(page)), (60 + number % 5 * 224, 37 + number // 5 * 280))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


@contextmanager
def exported(shape: bootstrap.TinyConfig, contents: list[Content]) -> Iterator[str]:
    """The folder of a bidirectional model of random weights, as the export step writes it."""
    with (
        tempfile.TemporaryDirectory() as base,
        tempfile.TemporaryDirectory() as trained,
        tempfile.TemporaryDirectory() as out,
    ):
        bootstrap.create(base, [content[0].text for content in contents if content[0].text], shape, seed=0)
        model = load_backbone(base)
        set_attention(model, "bidirectional")
        save_backbone(model, trained)
        copy_processor(base, trained)
        export_model(trained, out, read_spec(trained), max_tokens=1024, dtype=torch.float32)
        yield out


def compare(name: str, folder: str, contents: list[Content], rounds: int) -> None:
    from sentence_transformers import SentenceTransformer

    embedder = Embedder(folder, dtype=torch.float32)
    theirs = SentenceTransformer(folder, device=str(embedder.device))
    parameters = sum(p.numel() for p in embedder.encoder.parameters())

    def encode(batch_size: int) -> np.ndarray:
        given = [c[0].text if c[0].image is None else Image.open(io.BytesIO(c[0].image)) for c in contents]
        return theirs.encode(given, batch_size=batch_size, show_progress_bar=False, normalize_embeddings=True)

    embedder.encode(contents[:8])
    theirs.encode([content[0].text for content in contents[:8] if content[0].text], show_progress_bar=False)
    ours, by_size = Measured(), {size: Measured() for size in BATCH_SIZES}
    for _ in range(rounds):
        ours.take(lambda: embedder.encode(contents))
        for size, measured in by_size.items():
            measured.take(lambda size=size: encode(size))
    size, best = min(by_size.items(), key=lambda item: item[1].cpu_s)
    cosines = (ours.vectors * best.vectors).sum(1)
    rates = {"Embedder": ours, f"sentence-transformers, batches of {size}": best}
    print(f"\n{name}: {parameters / 1e6:.1f} M parameters, {len(contents)} contents on {embedder.device}")
    for who, measured in rates.items():
        print(
            f"  {who}: {len(contents) / measured.wall_s:.1f} contents/s, {1000 * measured.cpu_s / len(contents):.1f} CPU ms each"
        )
    print(f"  ratio: {best.wall_s / ours.wall_s:.2f} by the clock, {best.cpu_s / ours.cpu_s:.2f} by CPU time")
    print(f"  vectors: cosine {cosines.min():.7f}, largest difference {np.abs(ours.vectors - best.vectors).max():.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="an exported folder; without it, models of random weights")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--contents", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pages", choices=["a4", "small"], default="a4")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    contents = pages_and_texts(options.contents, options.pages)
    if options.model:
        compare(Path(options.model).name, options.model, contents, options.rounds)
        return
    for name in options.shapes:
        with exported(SHAPES[name], contents) as folder:
            compare(name, folder, contents, options.rounds)


if __name__ == "__main__":
    main()
