"""Packs of equal cost against cost buckets with padding: the same documents, the same model, the same count of FLOPs.

    python benchmarks/packing.py [--documents 20000] [--budget 8192] [--window 1024] [--seed 0] [--corpus DIR]

Baseline: the sampling of the MoCa authors, from its description. The cost of a document is its text tokens + 4 * image tokens
(of the raw pixels) + 2 * images, at most 1280; its bucket is the next of the thresholds 32 * int(1.3^i); a micro-batch is
12800 // threshold documents of one bucket, cut at 1280 tokens and padded to the longest of them, a multiple of 32. In
the form that was meant the ranks of a micro-step draw from one bucket, in the form that runs a random sampler deals any
micro-batch to any rank. Ours: `pack` or `pack_evenly` over windows of documents, dealt by `row_plan`.

Documents: a synthetic mix (35 % texts, 25 % photos and 40 % pages with captions), and lengths drawn from a folder of
interleaved Parquet where there is one. Costs are those of a Qwen2.5-VL-3B; padding costs what a token costs outside attention.

Printed: fill, the share of real tokens (theirs: of the padded batch; ours: of the budget, although what a row lacks is not computed);
padding, the share of what is computed; cut, the share of all tokens that never enters; the work of the slowest rank over the mean
of the ranks, averaged over steps, for 8 and 32 ranks with 1 and 4 micro-batches a step. PASS: packs of `pack_evenly` are 97 % full
and the slowest rank is within 5 %. The exit status is 1 otherwise.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from moca_core.bootstrap import train_tokenizer
from moca_core.data.image_files import header_size
from moca_core.data.images import grid_thw
from moca_core.data.packing import pack, pack_evenly
from moca_core.spec import BackboneSpec
from pipelines.training.plan import row_plan

MIN_FILL, MAX_STRAGGLER = 0.97, 1.05
RANKS, ACCUMULATION, STEPS = (8, 32), (1, 4), 64
CORPUS = Path(__file__).parents[2] / "shared/data/kicad/interleaved"
CELL_PX = 28 * 28  # one image token
MAX_LENGTH, MICRO_BATCH_COST, PAD_TO = 1280, 12800, 32  # of the authors
THRESHOLDS = np.array(sorted({PAD_TO * int(1.3**i) for i in range(40)}))

SPEC_3B = BackboneSpec(
    model_type="qwen2_5_vl",
    image_token_id=151655,
    vision_start_token_id=151652,
    vision_end_token_id=151653,
    mask_token_id=151665,
    special_token_ids=(),
    vocab_size=151936,
    patch_size_px=14,
    merge_size=2,
    temporal_patch_size=2,
    channels=3,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
    min_image_px=256 * CELL_PX,
    max_image_px=1024 * CELL_PX,
    text_hidden=2048,
    text_layers=36,
    text_width=2048,
    text_kv_width=256,
    text_intermediate=11008,
    vision_hidden=1280,
    vision_layers=32,
    vision_params_per_layer=4 * 1280**2 + 3 * 1280 * 3420,
    merger_params=5120 * 5120 + 5120 * 2048,
    vision_full_layers=4,
    vision_window_px=112,
    vision_position_side=0,
)


@dataclass(frozen=True)
class Part:
    """A paragraph, or an image with the two tokens around it. `raw` image tokens are those of the file, `image` those of the model."""

    tokens: int
    image: int = 0
    raw: int = 0


Doc = list[Part]


def synthetic(count: int, rng: np.random.Generator) -> Iterator[Doc]:
    """Lognormal lengths of web texts, captions, photos and scanned pages."""
    for kind in rng.choice(["text", "photo", "page"], size=count, p=[0.35, 0.25, 0.4]):
        if kind == "text":
            left, doc = int(np.clip(rng.lognormal(6.6, 0.9), 30, 1e5)), []
            while left:
                doc.append(Part(min(left, int(np.clip(rng.lognormal(4.2, 0.7), 5, 1000)))))
                left -= doc[-1].tokens
            yield doc
        else:
            raw = (
                np.clip(rng.lognormal(5.9, 0.6), 60, 4000)
                if kind == "photo"
                else np.clip(rng.lognormal(7.6, 0.5), 300, 9000)
            )
            image = int(np.clip(raw, 256, 1024))
            yield [Part(image + 2, image, int(raw)), Part(int(np.clip(rng.lognormal(4.6, 0.8), 10, 3000)))]


def real(folder: Path, count: int, rng: np.random.Generator) -> Iterator[Doc]:
    """The lengths of the documents of a folder, drawn with replacement; a tokenizer of their own texts."""
    rows = [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    tokenizer = train_tokenizer((text for row in rows for text in row["texts"] if text), 8192).backend_tokenizer
    docs = [
        [part for pair in zip(row["texts"], row["images"], strict=True) for part in parts(*pair, tokenizer)]
        for row in rows
    ]
    docs = [doc for doc in docs if doc]
    yield from (docs[i] for i in rng.integers(len(docs), size=count))


def parts(text: str | None, image: bytes | None, tokenizer) -> Doc:
    if image is None:
        lengths = [
            len(tokenizer.encode(p + "\n\n", add_special_tokens=False).ids) for p in (text or "").split("\n\n") if p
        ]
        return [Part(n) for n in lengths]
    width, height = header_size(image)
    tokens = SPEC_3B.image_tokens(grid_thw(width, height, SPEC_3B))
    return [Part(tokens + 2, tokens, width * height // CELL_PX)]


def cut(doc: Doc, most: int) -> Doc:
    """The authors' truncation: at `most` tokens, and before an image that does not fit."""
    kept, left = [], most
    for part in doc:
        if part.tokens <= left:
            kept.append(part)
        elif not part.image and left:
            kept.append(Part(left))
        left -= part.tokens
        if left <= 0:
            break
    return kept


def split(doc: Doc, budget: int) -> Iterator[Doc]:
    """Our pieces: the rule of `Renderer.pieces`."""
    piece: Doc = []
    for part in doc:
        for tokens in [budget] * ((part.tokens - 1) // budget) + [(part.tokens - 1) % budget + 1]:
            if size(piece) + tokens > budget:
                yield piece
                piece = []
            piece = [*piece, Part(tokens, part.image)]
    yield piece


def size(doc: Doc) -> int:
    return sum(part.tokens for part in doc)


def flops(docs: list[Doc], padding: int = 0) -> float:
    sides = (math.sqrt(part.image * SPEC_3B.group_size) for doc in docs for part in doc if part.image)
    squares = [(1, round(side), round(side)) for side in sides]  # of about the same area: windows cost little
    return SPEC_3B.flops([size(doc) for doc in docs] + [1] * padding, squares)


@dataclass(frozen=True)
class Measured:
    """`straggler` is the slowest rank over the mean by (ranks, micro-batches a step)."""

    fill: float
    padding: float
    cut: float
    straggler: dict[tuple[int, int], float]


def stragglers(deal: Callable[[int, int], np.ndarray]) -> dict[tuple[int, int], float]:
    """Of `deal(ranks, micro-batches a step)`, the work of micro-steps [n, ranks]."""
    ratios = {}
    for ranks in RANKS:
        for micro_batches in ACCUMULATION:
            micro_steps = deal(ranks, micro_batches)
            steps = len(micro_steps) // micro_batches
            work = micro_steps[: steps * micro_batches].reshape(steps, micro_batches, ranks).sum(1)
            ratios[ranks, micro_batches] = float((work.max(1) / work.mean(1)).mean())
    return ratios


def buckets(docs: list[Doc], rng: np.random.Generator) -> tuple[Measured, Measured]:
    """The authors' sampling: (as it was meant, as it runs)."""
    bucket = np.searchsorted(THRESHOLDS, [bucket_cost(doc) for doc in docs])
    kept = [cut(doc, MAX_LENGTH) for doc in docs]
    tokens = slots = 0
    work: dict[int, list[float]] = {}  # by bucket, of its micro-batches
    for b in np.unique(bucket):
        members, rows = rng.permutation(np.flatnonzero(bucket == b)), MICRO_BATCH_COST // int(THRESHOLDS[b])
        for first in range(0, len(members) - rows + 1, rows):
            batch = [kept[i] for i in members[first : first + rows]]
            real_tokens = sum(map(size, batch))
            padded = len(batch) * -(-max(map(size, batch)) // PAD_TO) * PAD_TO
            tokens, slots = tokens + real_tokens, slots + padded
            work.setdefault(int(b), []).append(flops(batch, padded - real_tokens))
    lost = 1 - sum(map(size, kept)) / sum(map(size, docs))
    every = np.concatenate(list(work.values()))
    meant = stragglers(lambda ranks, _: same_bucket(work, ranks, rng))
    runs = stragglers(lambda ranks, _: dealt(rng.permutation(every), ranks))
    share = tokens / slots
    return Measured(share, 1 - share, lost, meant), Measured(share, 1 - share, lost, runs)


def bucket_cost(doc: Doc) -> int:
    text, raw = sum(p.tokens for p in doc if not p.image), sum(p.raw for p in doc)
    return min(text + 4 * raw + 2 * sum(p.image > 0 for p in doc), MAX_LENGTH)


def dealt(work: np.ndarray, ranks: int) -> np.ndarray:
    """Micro-steps [n, ranks] of consecutive micro-batches."""
    return work[: len(work) // ranks * ranks].reshape(-1, ranks)


def same_bucket(work: dict[int, list[float]], ranks: int, rng: np.random.Generator) -> np.ndarray:
    return rng.permutation(np.concatenate([dealt(np.array(of), ranks) for of in work.values()]))


def packs(docs: list[Doc], options: argparse.Namespace, *, evenly: bool) -> tuple[Measured, Measured]:
    """Ours, every window of documents packed alone: (rows dealt at random, dealt by the plan)."""
    costs, tokens = [], 0
    for first in range(0, len(docs), options.window):
        window = docs[first : first + options.window]
        pieces = [piece for doc in window for piece in split(doc, options.budget)]
        lengths, work = [size(p) for p in pieces], [flops([p]) for p in pieces]
        tokens += sum(lengths)
        rows = pack_evenly(lengths, work, options.budget) if evenly else pack(lengths, options.budget)
        costs += [sum(work[i] for i in members) for members in rows]
    fill, lost = tokens / (len(costs) * options.budget), 1 - tokens / sum(map(size, docs))
    at_random = np.random.default_rng(options.seed).permutation(costs)
    random = stragglers(lambda ranks, _: dealt(at_random, ranks))
    planned = stragglers(lambda ranks, micro_batches: by_plan(np.array(costs), ranks, micro_batches, options.seed))
    return Measured(fill, 0.0, lost, random), Measured(fill, 0.0, lost, planned)


def by_plan(costs: np.ndarray, ranks: int, micro_batches: int, seed: int) -> np.ndarray:
    plans = [row_plan(costs, ranks * micro_batches, range(STEPS), rank, ranks, seed) for rank in range(ranks)]
    return costs[[[address["row"] for address in plan] for plan in plans]].T


def compare(name: str, docs: list[Doc], options: argparse.Namespace, rng: np.random.Generator) -> bool:
    """Prints one table; whether ours passes."""
    meant, runs = buckets(docs, rng)
    full_random, full_planned = packs(docs, options, evenly=False)
    even_random, even = packs(docs, options, evenly=True)
    rows = {
        "buckets, ranks in one bucket": meant,
        "buckets, as they run": runs,
        "best fit, random order": full_random,
        "best fit, our plan": full_planned,
        "even packs, random order": even_random,
        "ours: even packs, our plan": even,
    }
    print(f"\n{name}: {len(docs)} documents, {sum(map(size, docs)) / 1e6:.1f} M tokens")
    columns = "".join(f"{f'{ranks} ranks x{a}':>14}" for ranks, a in even.straggler)
    print(f"{'':32}{'fill':>8}{'padding':>9}{'cut':>8}{columns}")
    for label, m in rows.items():
        ratios = "".join(f"{ratio:14.3f}" for ratio in m.straggler.values())
        print(f"{label:32}{m.fill:8.1%}{m.padding:9.1%}{m.cut:8.1%}{ratios}")
    passed = even.fill >= MIN_FILL and max(even.straggler.values()) <= MAX_STRAGGLER
    print(
        f"{'PASS' if passed else 'FAIL'}: {even.fill:.1%} full (at least {MIN_FILL:.0%}), slowest rank at most "
        f"{max(even.straggler.values()):.3f} (at most {MAX_STRAGGLER})"
    )
    return passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--budget", type=int, default=8192, help="tokens of a row")
    parser.add_argument("--window", type=int, default=1024, help="documents that are packed together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="interleaved Parquet: columns texts and images")
    options = parser.parse_args()
    if options.budget < (least := SPEC_3B.max_image_px // CELL_PX + 2):
        parser.error(
            f"--budget {options.budget} must be at least {least}: an image of the 3B model and the tokens around it"
        )
    rng = np.random.default_rng(options.seed)
    corpora = {"synthetic mix": list(synthetic(options.documents, rng))}
    if options.corpus.is_dir():
        corpora["/".join(options.corpus.parts[-2:])] = list(real(options.corpus, options.documents, rng))
    sys.exit(not all([compare(name, docs, options, rng) for name, docs in corpora.items()]))


if __name__ == "__main__":
    main()
