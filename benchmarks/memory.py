"""What a training step holds in memory, as pipelines/memory.py calculates it and as a process really takes it.

    python benchmarks/memory.py                     on this machine's CPU, about four minutes
    python benchmarks/memory.py --device cuda       one process on a GPU: the allocator's peak

Every case is a process of its own (or one per rank): a model of 50 M random weights, a row of real documents of the built-in corpus
with images, two steps. On a CPU the high-water mark of the process during the second step counts, less what it held before there was a
model, with an allocator that gives back at once what is freed. Exits with 1 where a case is more than 10 % off.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
TOLERANCE = 0.10
ROW_TOKENS, PAIRS = 2048, 4


@dataclass(frozen=True)
class Case:
    stage: str  # "pretrain" or "finetune"
    precision: str = "fp32"
    checkpointing: str = "none"
    micro_batches: int = 2
    zero_stage: int = 0
    ranks: int = 1
    exchange: str = "step"

    def __str__(self) -> str:
        zero = f"ZeRO {self.zero_stage}, {self.ranks} ranks, {self.exchange}" if self.ranks > 1 else "one process"
        return f"{self.stage:9} {self.precision} {self.checkpointing:10} {self.micro_batches} micro-batches, {zero}"


CASES = (
    *(Case("pretrain", checkpointing=kind) for kind in ("none", "selective", "full")),
    Case("pretrain", micro_batches=1),
    Case("finetune"),
    Case("finetune", checkpointing="selective"),
)
SHARED = (
    *(Case("pretrain", zero_stage=stage, ranks=2) for stage in (1, 2, 3)),
    *(Case("pretrain", zero_stage=stage, ranks=2, exchange="micro_batch") for stage in (2, 3)),
)
GPU = (
    Case("pretrain", "bf16"),
    Case("pretrain", "bf16", "selective"),
)  # on CPUs products in 16 bits keep copies of their own


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)  # this process measures that one
    parser.add_argument("--group", help=argparse.SUPPRESS)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of cases, from 0")
    options = parser.parse_args()
    cases = CASES + (GPU if options.device == "cuda" else SHARED)
    if options.case is not None:
        print(json.dumps(measure(cases[options.case], options.device, options.group)))
        return 0
    worst = 0.0
    print(f"{'':75}{'calculated':>11}{'measured':>10}{'ratio':>8}   parts, MB")
    for number, case in enumerate(cases):
        if options.only and number not in options.only:
            continue
        calculated, measured, parts = compared(number, case, options.device)
        ratio = calculated / measured
        worst = max(worst, abs(ratio - 1))
        shown = ", ".join(f"{name} {value / 1e6:.0f}" for name, value in parts.items() if value)
        print(f"{case!s:75}{calculated / 1e6:8.0f} MB{measured / 1e6:7.0f} MB{ratio:8.3f}   {shown}", flush=True)
    print(f"worst: {worst:.1%} off")
    return int(worst > TOLERANCE)


def compared(number: int, case: Case, device: str) -> tuple[float, float, dict[str, float]]:
    """(bytes by the closed form, bytes that the fullest rank took, parts of the closed form)"""
    with tempfile.TemporaryDirectory() as group:
        command = [sys.executable, __file__, "--device", device, "--case", str(number), "--group", group]
        environment = os.environ | ALLOCATOR | {"WORLD_SIZE": str(case.ranks), "DS_ACCELERATOR": device}
        ranks = [
            subprocess.Popen(command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=-1)
            for rank in range(case.ranks)
        ]
        outputs = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f"{case}: a process failed")
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
    fullest = max(found, key=lambda rank: rank["measured"])
    return fullest["calculated"], fullest["measured"], fullest["parts"]


def measure(case: Case, device: str, group: str) -> dict:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if case.ranks > 1:
        rank, world = int(os.environ["RANK"]), case.ranks
        dist.init_process_group("gloo", f"file://{group}/group", rank=rank, world_size=world)
    from cluster.engine import EngineConfig, open_engine
    from cluster.torch_engine import TorchEngine

    with tempfile.TemporaryDirectory() as folder:
        config, spec, batches = prepare(folder, case)
    if case.ranks > 1:
        import deepspeed  # noqa: F401
    warm_up(torch, config)
    before = held(device)
    objective = make_objective(config, spec, case, device)
    shared = {"zero_stage": case.zero_stage, "gradient_exchange": case.exchange}
    settings = EngineConfig(case.precision, **shared) if case.ranks > 1 else EngineConfig(case.precision)
    engine = open_engine(objective, settings) if case.ranks > 1 else TorchEngine(objective, settings, device)
    del objective
    for _ in range(2):
        reset(device)
        for number, batch in enumerate(batches, start=1):
            terms = engine.forward(batch)
            loss = sum(term.sum for name, term in terms.items() if engine.module.weights.get(name))
            engine.backward(loss, last=number == len(batches))
            del terms, loss
        engine.step(1e-5)
    measured = peak(device) - before
    by_form, parts = calculated(case, spec, batches)
    return {"measured": measured, "calculated": by_form, "parts": parts}


def prepare(folder: str, case: Case):
    """A model's config, its spec, and one row of documents for every micro-batch."""
    from moca_core.bootstrap import TinyConfig, describe
    from moca_core.data.masking import mask
    from moca_core.data.pairs import collate_pairs
    from moca_core.data.render import Renderer, load_tokenizer
    from moca_core.data.rows import document_sequences, packed_row
    from moca_core.sources.builtin import documents as builtin
    from moca_core.spec import read_spec
    from moca_core.types import Pair

    sizes = TinyConfig(
        text_hidden=512, text_layers=8, text_heads=8, text_kv_heads=2, text_intermediate=2048, vocab_size=4096,
        vision_hidden=320, vision_layers=6, vision_heads=8, vision_intermediate=1024, min_image_px=64 * 28**2, max_image_px=192 * 28**2,
    )  # fmt: skip
    contents = [document for unit in builtin.list_units()[:2] for document in builtin.read_unit(None, unit)]
    texts = [segment.text for document in contents for segment in document.content if segment.text]
    config = describe(folder, texts, sizes)
    config.text_config.vocab_size = 16_384
    config.save_pretrained(folder)
    spec = read_spec(folder)
    renderer = Renderer(load_tokenizer(f"{folder}/tokenizer.json"), spec, ROW_TOKENS // 2)
    if case.stage == "finetune":
        short = Renderer(renderer.tokenizer, spec, ROW_TOKENS // PAIRS // 2)
        chosen = [d for d in contents if len(d.content) > 1][: case.micro_batches * PAIRS]
        pairs = [Pair("docs", document.content, (document.content[1:],)) for document in chosen]
        per_step = [pairs[start : start + PAIRS] for start in range(0, len(pairs), PAIRS)]
        return config, spec, [collate_pairs(p, short, num_negatives=0, sources=["docs"], key=(0,)) for p in per_step]
    rows = full_rows(s for d in contents for s in document_sequences(d, renderer))
    masked = (mask(packed_row(r, spec), spec, seed=0, epoch=0, mlm_ratio=0.4, mae_ratio=0.5) for r in rows)
    return config, spec, list(islice(masked, case.micro_batches))


def full_rows(sequences: Iterator[dict]) -> Iterator[list[dict]]:
    row, tokens = [], 0
    for sequence in sequences:
        row.append(sequence)
        tokens += len(sequence["input_ids"])
        if tokens > ROW_TOKENS:
            yield row
            row, tokens = [], 0


def make_objective(config, spec, case: Case, device: str):
    import torch
    from transformers import AutoModelForImageTextToText

    from moca_core.attention import set_attention
    from moca_core.backbone import prepare as prepare_backbone
    from moca_core.objective.contrastive import Contrastive
    from moca_core.objective.pretraining import MaskedModelling
    from moca_core.recompute import set_recompute

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config)
    prepare_backbone(model)
    set_attention(model, "bidirectional")
    set_recompute(model, case.checkpointing)
    return Contrastive(model, spec, tasks=["docs"]) if case.stage == "finetune" else MaskedModelling(model, spec)


def warm_up(torch, config) -> None:
    """What the first model and the first product of a process allocate for good: code."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        AutoModelForImageTextToText.from_config(config)
    square = torch.randn(512, 512, requires_grad=True)
    (square @ square).sum().backward()


def reset(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark of this process


def held(device: str) -> float:
    reset(device)
    return peak(device)


def peak(device: str) -> float:
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def calculated(case: Case, spec, batches) -> tuple[float, dict[str, float]]:
    """(bytes, and their parts) by pipelines/memory.py, from the config alone."""
    from pipelines import memory
    from pipelines.sizing import weight_count

    count = weight_count(spec, tied=True, decoder_layers=int(case.stage == "pretrain"))
    weights = memory.Weights(count, count, spec.vocab_size * spec.text_hidden)
    adds_up = case.exchange == "step" and case.micro_batches > 1
    sharing = memory.Sharing(case.zero_stage, case.ranks, adds_up)
    state = memory.state_bytes(weights, case.precision, sharing)
    activations = max(
        (memory.activation_bytes(spec, micro_batch(batch, spec), case.checkpointing, case.precision) for batch in batches),
        key=lambda parts: sum(parts.values()),
    )  # fmt: skip
    return memory.step_bytes(state, activations, weights, sharing, case.micro_batches), state | activations


def micro_batch(batch, spec):
    from pipelines.memory import MicroBatch

    stream = batch.stream
    tokens, images = len(stream.input_ids), int((stream.input_ids == spec.image_token_id).sum())
    if not hasattr(batch, "labels"):
        return MicroBatch(tokens, images)
    return MicroBatch(tokens, images, int((batch.labels >= 0).sum()), int(batch.masked_groups.sum()))


if __name__ == "__main__":
    sys.exit(main())
