"""A pre-training step, ours against the authors' way: the same documents, masks, noise, weights and optimizer.

    python benchmarks/step.py                                       a small model on this machine's CPU, about four minutes
    python benchmarks/step.py --size 3b --device cuda               the shape of Qwen2.5-VL-3B in bf16, on one GPU of 140 GB

torch and transformers do (no Ray, no DeepSpeed). Documents are of the built-in corpus (scikit-learn, matplotlib), half of image tokens.
Every variant passes several times over all of them and prints real tokens per second, the share of the device's peak that the model's
FLOPs come to (MFU: neither padding nor recomputation counts), peak memory (on a CPU: beyond weights and optimizer) and padding:

    authors   cost buckets with padding, logits at all positions, MAE decoder over all of the sequence, full recomputation
    packed    ours, with full recomputation all the same
    selective ours, with cheap activations computed again
    ours      our packs, head, decoder, and nothing computed again
    compiled  ours, with the layers compiled by torch.compile (minutes at the start)

The MLM loss of all variants must be the same.
"""

import argparse
import copy
import ctypes
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from authors_step import PaddedModelling, buckets
from transformers import AutoModelForImageTextToText, PreTrainedConfig

from cluster.devices import peak_flops_per_s
from cluster.engine import EngineConfig
from cluster.torch_engine import TorchEngine
from moca_core.attention import set_attention
from moca_core.backbone import prepare
from moca_core.bootstrap import TinyConfig, describe
from moca_core.compiled import compile_layers
from moca_core.data.masking import mask
from moca_core.data.packing import pack_evenly
from moca_core.data.render import Renderer, load_tokenizer
from moca_core.data.rows import document_sequences, packed_row
from moca_core.objective.pretraining import MaskedModelling
from moca_core.recompute import set_recompute
from moca_core.sources.builtin import documents as builtin
from moca_core.spec import BackboneSpec, read_spec
from moca_core.types import MaskedBatch

RECOMPUTE = {"packed": "full", "selective": "selective", "ours": "none", "compiled": "none"}
VARIANTS = ("authors", *RECOMPUTE)
MAX_TOKENS = 2048  # of a document; longer ones come in pieces
IMAGE_SHARE = 0.5  # of all tokens
MLM_RATIO, MAE_RATIO, MAE_WEIGHT = 0.4, 0.5, 0.5


@dataclass(frozen=True)
class Size:
    model: TinyConfig
    vocab_size: int
    row_tokens: int
    tokens: int  # of all documents
    precision: str


SIZES = {
    "small": Size(
        TinyConfig(
            text_hidden=256, text_layers=6, text_heads=8, text_kv_heads=2, text_intermediate=768,
            vision_hidden=192, vision_layers=6, vision_heads=6, vision_intermediate=512,
            min_image_px=64 * 28**2, max_image_px=256 * 28**2,
        ),
        8192, 4096, 16_384, "fp32",
    ),
    "3b": Size(
        TinyConfig(
            text_hidden=2048, text_layers=36, text_heads=16, text_kv_heads=2, text_intermediate=11008,
            vision_hidden=1280, vision_layers=32, vision_heads=16, vision_intermediate=3420,
            min_image_px=256 * 28**2, max_image_px=1024 * 28**2,
        ),
        151_936, 8192, 65_536, "bf16",
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="default: all, on a CPU without compiled")
    parser.add_argument("--passes", type=int, default=4, help="over all documents; the best but the first counts")
    parser.add_argument("--row-tokens", type=int, help="of a pack (default: by size)")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ.setdefault(
        "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"
    )  # packs differ: fixed segments fragment
    on_cpu = options.device == "cpu"
    variants = options.variants or VARIANTS[: -1 if on_cpu else None]
    size, device = SIZES[options.size], torch.device(options.device)
    with tempfile.TemporaryDirectory() as folder:
        work = prepare_work(folder, size, options.row_tokens or size.row_tokens)
    where = f"{options.threads} CPU thread(s)" if on_cpu else torch.cuda.get_device_name()
    print(
        f"{len(work.documents)} documents, {work.tokens} tokens, {work.image_share:.0%} of images, {size.precision}, {where}"
    )
    print(f"{'':10}{'tokens/s':>10}{'ratio':>8}{'MFU':>8}{'TFLOP/s':>10}{'peak GB':>10}{'padding':>9}{'MLM loss':>16}")
    runs = {name: passes(name, work, size, device, options.passes) for name in variants}
    found: dict[str, list[Pass]] = {name: [] for name in variants}
    if on_cpu:  # in turns, so that what else the machine does slows all of them
        for turn in zip(*runs.values(), strict=True):
            for name, one in zip(variants, turn, strict=True):
                found[name].append(one)
    first = None
    for name in variants:
        try:
            found[name] += runs[name]  # on a GPU, which holds one of them at a time
        except torch.OutOfMemoryError:
            print(f"{name:10}   out of memory: fewer --row-tokens?", flush=True)
        if len(found[name]) == options.passes:
            best = min(found[name][1:], key=lambda one: one.seconds)
            # the first pass: before any update, and on a CPU before the allocator has memory of earlier passes to give again
            best = replace(best, mlm_loss=found[name][0].mlm_loss, peak_gb=found[name][0].peak_gb)
            first = first or best
            show(name, best, first, work, peak_flops_per_s(device, size.precision))


@dataclass(frozen=True)
class Work:
    """The same documents for all, one by one and in packs."""

    config: PreTrainedConfig
    spec: BackboneSpec
    documents: list[MaskedBatch]
    packs: list[MaskedBatch]

    @property
    def tokens(self) -> int:
        return sum(len(document.stream.input_ids) for document in self.documents)

    @property
    def image_share(self) -> float:
        return sum(len(document.masked_groups) for document in self.documents) / self.tokens


@dataclass(frozen=True)
class Pass:
    """Over all documents, and an optimizer step."""

    seconds: float
    mlm_loss: float
    peak_gb: float
    padding: float
    useful_flops: float  # of the model on the documents, the same for all variants


def passes(name: str, work: Work, size: Size, device: torch.device, count: int) -> Iterator[Pass]:
    torch.manual_seed(0)
    with device:
        dtype = torch.bfloat16 if size.precision == "bf16" else torch.float32
        model = AutoModelForImageTextToText.from_config(copy.deepcopy(work.config), dtype=dtype)
        prepare(model)
        set_attention(model, "bidirectional")
        ours = MaskedModelling(model, work.spec, mae_weight=MAE_WEIGHT)
        module = PaddedModelling(model, work.spec) if name == "authors" else ours
    if name == "authors":
        batches = buckets(work.documents, work.spec, MAX_TOKENS)
        read = sum(len(batch) * max(len(d.stream.input_ids) for d in batch) for batch in batches)
    else:
        batches, read = work.packs, work.tokens
        set_recompute(model, RECOMPUTE[name])
        if name == "compiled":
            compile_layers(model)
    useful = sum(map(ours.flops, work.documents))
    counts = {term: sum(ours.counts(document)[term] for document in work.documents) for term in ours.weights}
    engine = TorchEngine(module, EngineConfig(size.precision), device)
    held_gb = reset_peak(device)
    for _ in range(count):
        started, mlm = time.perf_counter(), torch.zeros((), device=device)
        for number, batch in enumerate(batches, start=1):
            terms = engine.forward(batch)
            loss = sum(ours.weights[term] * terms[term].sum / counts[term] for term in counts)
            engine.backward(loss, last=number == len(batches))
            mlm += terms["mlm"].sum.detach()
        engine.step(1e-6)
        mean = mlm.item() / counts["mlm"]  # which waits for the device
        yield Pass(time.perf_counter() - started, mean, peak_gb(device) - held_gb, 1 - work.tokens / read, useful)


def show(name: str, best: Pass, first: Pass, work: Work, peak_flops: float | None) -> None:
    speed = best.useful_flops / best.seconds
    mfu = f"{speed / peak_flops:.1%}" if peak_flops else "-"
    print(
        f"{name:10}{work.tokens / best.seconds:10.0f}{first.seconds / best.seconds:8.2f}{mfu:>8}{speed / 1e12:10.3g}"
        f"{best.peak_gb:10.2f}{best.padding:9.1%}{best.mlm_loss:16.4f}",
        flush=True,
    )


def prepare_work(folder: str, size: Size, row_tokens: int) -> Work:
    """Pieces of real documents, as many as make up the size's tokens, `IMAGE_SHARE` of them of images."""
    contents = [document for unit in builtin.list_units() for document in builtin.read_unit(None, unit)]
    texts = (segment.text for document in contents for segment in document.content if segment.text)
    config = describe(folder, texts, replace(size.model, vocab_size=4096))  # its tokenizer; the model has its own size
    config.text_config.vocab_size = size.vocab_size
    config.save_pretrained(folder)
    spec = read_spec(folder)
    renderer = Renderer(load_tokenizer(f"{folder}/tokenizer.json"), spec, MAX_TOKENS)
    chosen, tokens, images = [], 0, 0
    waiting: dict[bool, list[dict]] = {True: [], False: []}  # by whether images are more than their share
    for number in np.random.default_rng(0).permutation(len(contents)):
        for sequence in document_sequences(contents[number], renderer):
            waiting[image_tokens(sequence, spec) > IMAGE_SHARE * len(sequence["input_ids"])].append(sequence)
        while waiting[wanted := images <= IMAGE_SHARE * tokens]:
            sequence = waiting[wanted].pop()
            chosen.append(sequence)
            tokens += len(sequence["input_ids"])
            images += image_tokens(sequence, spec)
            if tokens >= size.tokens:
                documents = [batch_of([sequence], spec) for sequence in chosen]
                return Work(config, spec, documents, packs(chosen, spec, row_tokens))
    raise SystemExit(f"the built-in corpus has not enough documents for {size.tokens} tokens")


def image_tokens(sequence: dict, spec: BackboneSpec) -> int:
    return int((sequence["input_ids"] == spec.image_token_id).sum())


def packs(sequences: list[dict], spec: BackboneSpec, row_tokens: int) -> list[MaskedBatch]:
    lengths = [len(sequence["input_ids"]) for sequence in sequences]
    costs = [spec.flops([n], s["grid_thw"]) for n, s in zip(lengths, sequences, strict=True)]
    return [batch_of([sequences[i] for i in members], spec) for members in pack_evenly(lengths, costs, row_tokens)]


def batch_of(sequences: list[dict], spec: BackboneSpec) -> MaskedBatch:
    return mask(packed_row(sequences, spec), spec, seed=0, epoch=0, mlm_ratio=MLM_RATIO, mae_ratio=MAE_RATIO)


def reset_peak(device: torch.device) -> float:
    """GB that do not count: on a CPU, where all variants stand side by side, what the process holds already."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return 0
    ctypes.CDLL(None).malloc_trim(0)  # what earlier passes left to the allocator
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark of this process
    return peak_gb(device)


def peak_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1e6


if __name__ == "__main__":
    main()
