"""The data path against the usual one: raw bytes to what a training step receives, tokens per second of one core.

    python benchmarks/data_throughput.py [--rounds 3] [--ray]

Documents: pages (A4 at 150 and 200 dpi) with their text, photos with captions, the figures of the KiCad manuals where they are, and
texts of the built-in corpus, in one shuffled order for both. Qwen's geometry: patches of 14 px, 256 to 1024 image tokens.
Ours: packed rows on disk, as the pack step leaves them -> masked batch -> bytes -> batch, the functions of the real stream.
Baseline: a torch DataLoader of one worker that opens images with PIL, then transformers' image processor and fast tokenizer,
padded batches of 8, expanded placeholders, fp32 pixel values, and the same two masks.
Both are measured in CPU seconds of the process and its children, so that other load on the machine hardly matters.
"""

import argparse
import io
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFile, ImageFont
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessorPil

from moca_core import bootstrap
from moca_core.data import images as images_module
from moca_core.data.codec import from_bytes
from moca_core.data.image_files import decode, header_size
from moca_core.data.images import patchify, read_patches
from moca_core.data.render import Renderer, load_tokenizer
from moca_core.data.rows import pack_contents
from moca_core.data.schema import PACKED
from moca_core.sources.builtin import documents as builtin
from moca_core.spec import BackboneSpec, read_spec
from moca_core.types import Content, Segment
from pipelines.steps.pretrain import PretrainConfig
from pipelines.tables import table_writer
from pipelines.training.row_streams import make_batch

MIN_IMAGE_PX, MAX_IMAGE_PX = 256 * 784, 1024 * 784
PACK_TOKENS = 4096
BATCH_DOCUMENTS = 8
MLM_RATIO, MAE_RATIO = 0.4, 0.5
PAGES, PHOTOS, SMALL_PHOTOS, FIGURES, TEXTS = 12, 8, 12, 12, 24
TARGET_RATIO = 3.0
KICAD = Path(__file__).resolve().parents[2] / "shared" / "data" / "kicad" / "images"


# The documents


def page(text: str, dpi: int) -> bytes:
    """An A4 page full of this text at 10 points, as a colour JPEG."""
    width, height = round(8.27 * dpi), round(11.69 * dpi)
    image = Image.new("RGB", (width, height), (252, 252, 248))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(10 * dpi / 72)
    margin, line_px = dpi * 3 // 4, dpi * 13 // 72
    words, top = (text + " ") * 20, margin
    for start in range(0, len(words), 95):
        if top > height - margin:
            break
        draw.text((margin, top), words[start : start + 95].replace("\n", " "), fill=(20, 20, 30), font=font)
        top += line_px
    return jpeg(image, 85)


def photo(width: int, height: int, seed: int) -> bytes:
    """Like nature: power falls with the square of the frequency, colours go together, some edges are sharp."""
    rng = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    amplitude = 1 / np.maximum(np.hypot(fy, fx), 1 / max(width, height)) ** 1.1
    bands = [
        np.fft.irfft2(amplitude * np.exp(2j * np.pi * rng.random(amplitude.shape)), (height, width)) for _ in "YUV"
    ]
    light, *colours = (band / band.std() for band in bands)
    pixels = np.stack(
        [128 + 45 * light + 12 * colours[0], 120 + 45 * light, 110 + 45 * light + 12 * colours[1]], axis=2
    )
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, size = rng.integers(width), rng.integers(height), rng.integers(20, height // 4)
        draw.ellipse((x, y, x + size, y + size), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return jpeg(image, 90)


def jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def real_texts() -> list[str]:
    units = [unit for unit in builtin.list_units() if unit["kind"] == "package"]
    found = (segment.text for unit in units[:6] for d in builtin.read_unit(None, unit) for segment in d.content)
    return [text for text in found if text and len(text) > 300]


def documents(texts: list[str]) -> list[tuple[str, Content]]:
    """[(kind, content)] in a shuffled order."""
    following = iter(texts)
    figures = [path.read_bytes() for path in sorted(KICAD.glob("*.png"))[::20][:FIGURES]] if KICAD.is_dir() else []
    found: list[tuple[str, bytes | None]] = [("text", None)] * TEXTS
    found += [("figure", figure) for figure in figures]
    found += [("small photo", photo(500, 375, seed)) for seed in range(SMALL_PHOTOS)]
    found += [("photo", photo(1920, 1080, 100 + seed)) for seed in range(PHOTOS)]
    found += [("page", page(next(following), (150, 200)[number % 2])) for number in range(PAGES)]
    order = np.random.default_rng(0).permutation(len(found))
    return [
        (kind, (*([Segment(image=image)] if image else []), Segment(text=next(following))))
        for kind, image in (found[i] for i in order)
    ]


# The usual way


@dataclass
class Padded:
    """What a padded collator delivers."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    masked_image: torch.Tensor
    pixel_values: torch.Tensor | None
    image_grid_thw: torch.Tensor | None

    def tensors(self) -> list[torch.Tensor]:
        return [t for t in (getattr(self, f.name) for f in fields(self)) if t is not None]


class Opened(torch.utils.data.Dataset):
    """Texts, and images as PIL opens them."""

    def __init__(self, contents: list[Content]) -> None:
        self.contents = contents

    def __len__(self) -> int:
        return len(self.contents)

    def __getitem__(self, index: int) -> list[str | Image.Image]:
        return [
            Image.open(io.BytesIO(s.image)).convert("RGB") if s.text is None else s.text for s in self.contents[index]
        ]


class Collator:
    """transformers' processor and tokenizer over a batch of documents, padded to the longest, masked for MLM and MAE."""

    def __init__(self, folder: str, spec: BackboneSpec) -> None:
        self.spec = spec
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, pad_token="<|endoftext|>")
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.special = torch.tensor(spec.special_token_ids)

    def __call__(self, batch: list[list[str | Image.Image]]) -> Padded:
        opened = [part for document in batch for part in document if not isinstance(part, str)]
        seen = self.processor(images=opened, return_tensors="pt") if opened else {}
        counts = iter((seen["image_grid_thw"].prod(1) // self.spec.group_size).tolist() if opened else [])
        texts = [
            "".join(
                part if isinstance(part, str) else f"<|vision_start|>{'<|image_pad|>' * next(counts)}<|vision_end|>"
                for part in document
            )
            for document in batch
        ]
        encoded = self.tokenizer(texts, padding=True, return_tensors="pt")
        ids = encoded["input_ids"]
        draws = torch.rand(2, *ids.shape)
        masked = (draws[0] < MLM_RATIO) & ~torch.isin(ids, self.special)
        return Padded(
            input_ids=torch.where(masked, self.spec.mask_token_id, ids),
            attention_mask=encoded["attention_mask"],
            labels=torch.where(masked, ids, -100),
            masked_image=(draws[1] < MAE_RATIO) & (ids == self.spec.image_token_id),
            pixel_values=seen.get("pixel_values"),
            image_grid_thw=seen.get("image_grid_thw"),
        )


def usual(contents: list[Content], collator: Collator, epochs: int) -> tuple[int, int]:
    """(real tokens, bytes shipped)."""
    loader = torch.utils.data.DataLoader(
        Opened(contents * epochs), batch_size=BATCH_DOCUMENTS, collate_fn=collator, num_workers=1
    )
    tokens = shipped = 0
    for batch in loader:
        tokens += int(batch.attention_mask.sum())
        shipped += sum(t.numel() * t.element_size() for t in batch.tensors())
    return tokens, shipped


# Ours


def ours(rows: int, make: Callable[[dict], bytes], epochs: int) -> tuple[int, int]:
    """(real tokens, bytes shipped)."""
    tokens = shipped = 0
    for epoch in range(epochs):
        for row in range(rows):
            data = make({"epoch": epoch, "row": row})
            tokens += len(from_bytes(data).stream.input_ids)
            shipped += len(data)
    return tokens, shipped


def through_ray(rows: int, make: Callable[[dict], bytes], tasks: int, steps: int) -> float:
    """Tokens per second of wall time of the real stream, once it runs."""
    from pipelines.training.stream import open_stream

    plan = [{"step": step, "epoch": step // rows, "row": step % rows} for step in range(steps)]
    tokens, started = 0, None
    for step, batches in open_stream(plan, make, tasks=tasks):
        if step >= steps // 4:  # processes start, imports
            tokens += sum(len(batch.stream.input_ids) for batch in batches) if started else 0
            started = started or time.perf_counter()
    return tokens / (time.perf_counter() - started)


# Measuring


@dataclass
class Cost:
    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    tokens: int = 0
    shipped: int = 0

    def measure(self, run: Callable[[], tuple[int, int]]) -> None:
        cpu_s, wall_s = cpu_seconds(), time.perf_counter()
        self.tokens, self.shipped = run()
        self.cpu_s.append(cpu_seconds() - cpu_s)
        self.wall_s.append(time.perf_counter() - wall_s)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / float(np.median(self.cpu_s))


def cpu_seconds() -> float:
    """User and system time of this process and of its children that ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


@contextmanager
def timed(owner: object, name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Adds up the CPU time of calls to owner.name, without that of timed calls inside of them."""
    original = getattr(owner, name)

    def call(*args, **kwargs):
        started, inside = time.process_time(), sum(seconds.values())
        result = original(*args, **kwargs)
        spent = time.process_time() - started - (sum(seconds.values()) - inside)
        seconds[name] = seconds.get(name, 0.0) + spent
        return result

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, original)


def breakdown(run: Callable[[], tuple[int, int]]) -> str:
    seconds: dict[str, float] = {}
    started = time.process_time()
    with (
        timed(ImageFile.ImageFile, "load", seconds),
        timed(Image.Image, "resize", seconds),
        timed(images_module, "patchify", seconds),
        timed(images_module, "open_image", seconds),
        timed(images_module, "plain", seconds),
    ):
        run()
    total = time.process_time() - started
    seconds["masks, positions, Parquet, codec"] = total - sum(seconds.values())
    return ", ".join(f"{name.strip('_')} {spent / total:.0%}" for name, spent in seconds.items())


def fast_against_exact(contents: list[tuple[str, Content]], spec: BackboneSpec) -> Iterator[str]:
    """Mean absolute difference in 8-bit steps, and PSNR, of the pixels that the fast path gives."""
    kinds = [kind for kind in dict(contents) if kind != "text"]
    for kind in kinds:
        files = [content[0].image for k, content in contents if k == kind]
        differences = [
            read_patches(f, spec, fast=True).astype(np.float32) - patchify(decode(f), spec).astype(np.float32)
            for f in files
        ]
        error = np.concatenate([d.ravel() for d in differences])
        square = float((error**2).mean())
        psnr = f"{10 * np.log10(255**2 / square):.1f} dB" if square else "equal"
        changed = sum(bool(d.any()) for d in differences)
        yield f"{kind}: {changed} of {len(files)} differ, mean {np.abs(error).mean():.2f} of 255, PSNR {psnr}"


def report(name: str, cost: Cost, documents: int, pages: int, megapixels: float) -> None:
    cpu_s = float(np.median(cost.cpu_s))
    print(
        f"{name:9} {cost.tokens / cpu_s:8.0f} tokens/s/core {documents / cpu_s:6.1f} documents {pages / cpu_s:5.1f} images "
        f"{megapixels / cpu_s:5.1f} megapixels, {cost.shipped / cost.tokens:6.0f} bytes shipped per token, "
        f"wall {cost.tokens / float(np.median(cost.wall_s)):.0f} tokens/s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="both ways are measured in turn, so many times")
    parser.add_argument("--epochs", type=int, default=2, help="passes over the documents in a round")
    parser.add_argument("--ray", action="store_true", help="also through Ray Data, with 1 and 2 tasks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as folder:
        run(folder, options)


def run(folder: str, options: argparse.Namespace) -> None:
    texts = real_texts()
    sizes = bootstrap.TinyConfig(min_image_px=MIN_IMAGE_PX, max_image_px=MAX_IMAGE_PX)
    bootstrap.create(folder, texts, sizes, seed=0)
    spec = read_spec(folder)
    kinds_and_contents = documents(texts)
    contents = [content for _, content in kinds_and_contents]
    files = [segment.image for content in contents for segment in content if segment.image]
    megapixels = sum(width * height for width, height in map(header_size, files)) / 1e6
    renderer = Renderer(load_tokenizer(f"{folder}/tokenizer.json"), spec, PACK_TOKENS)
    rendered = [renderer.first(content) for content in contents]
    rows = [row for _, row in pack_contents(rendered, spec, PACK_TOKENS)]
    write_rows(rows, f"{folder}/rows.parquet")
    make = partial(
        make_batch,
        config=PretrainConfig(mlm_ratio=MLM_RATIO, mae_ratio=MAE_RATIO),
        spec=spec,
        files=[f"{folder}/rows.parquet"],
        rows_per_file=[len(rows)],
        rows_per_group=1,
    )
    kinds = [kind for kind, _ in kinds_and_contents]
    mix = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    tokens = sum(map(len, rendered))
    image_tokens = sum(item.input_ids.count(spec.image_token_id) for item in rendered)
    print(
        f"{mix}; {tokens} tokens, {image_tokens / tokens:.0%} of images; {megapixels:.0f} megapixels, {len(rows)} rows"
    )
    for line in fast_against_exact(kinds_and_contents, spec):
        print(f"  fast path, {line}")
    collator, costs = Collator(folder, spec), {"baseline": Cost(), "ours": Cost()}
    usual(contents[:BATCH_DOCUMENTS], collator, 1)
    ours(1, make, 1)
    for _ in range(options.rounds):
        costs["baseline"].measure(lambda: usual(contents, collator, options.epochs))
        costs["ours"].measure(lambda: ours(len(rows), make, options.epochs))
    assert costs["ours"].tokens == costs["baseline"].tokens == options.epochs * tokens, "both deliver the same tokens"
    for name, cost in costs.items():
        report(name, cost, options.epochs * len(contents), options.epochs * len(files), options.epochs * megapixels)
    print(f"  ours goes to: {breakdown(lambda: ours(len(rows), make, 1))}")
    ratio = costs["ours"].tokens_per_s / costs["baseline"].tokens_per_s
    print(
        f"{'PASS' if ratio >= TARGET_RATIO else 'FAIL'}: {ratio:.2f} times the tokens per core, at least {TARGET_RATIO:g}"
    )
    if options.ray:
        from cluster.session import ClusterConfig, connect

        connect(ClusterConfig())
        for tasks in (1, 2):
            print(
                f"through Ray Data, {tasks} task(s): {through_ray(len(rows), make, tasks, 96):.0f} tokens/s of wall time"
            )


def write_rows(rows: list[dict], path: str) -> None:
    import pyarrow as pa

    with table_writer(path, PACKED, 1) as writer:
        writer.write(pa.Table.from_pylist(rows, schema=PACKED))


if __name__ == "__main__":
    main()
