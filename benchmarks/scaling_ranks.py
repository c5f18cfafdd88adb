"""What benchmarks/scaling.py measures: the training loop on one and two workers, and the traffic of every ZeRO stage.

Workers are processes of one thread under torch.distributed (gloo) and DeepSpeed, as Ray Train would start them. Rows are masked and
encoded beforehand; the stream decodes them, which is all that a training process does of it.
"""

import contextlib
import io
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

from moca_core.bootstrap import TinyConfig, describe
from moca_core.data.codec import from_bytes, to_bytes
from moca_core.data.masking import mask
from moca_core.data.render import Renderer, load_tokenizer
from moca_core.data.rows import pack_contents
from moca_core.spec import read_spec
from moca_core.types import Segment
from pipelines.training.plan import row_plan

ROW_TOKENS, ROWS_PER_STEP, WARM_UP, STEPS = 1024, 4, 1, 3
DOCUMENTS = 60
MLM_RATIO, MAE_RATIO = 0.4, 0.5
IMPORTED_ONCE = ["deepspeed", "moca_core.backbone", "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl"]
COLLECTIVES = {
    "all_reduce": 2,
    "all_gather_into_tensor": 1,
    "reduce_scatter_tensor": 1,
}  # how often a ring passes it on


def prepare(folder: str) -> None:
    """The demo's model without weights, and masked rows of made-up documents: what every pass trains on."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("aeioulnrst"), size)) for size in rng.integers(2, 9, 500)]
    texts = [" ".join(rng.choice(words, rng.integers(60, 400))) for _ in range(DOCUMENTS)]
    describe(folder, texts, TinyConfig())
    spec = read_spec(folder)
    renderer = Renderer(load_tokenizer(f"{folder}/tokenizer.json"), spec, ROW_TOKENS)
    pieces = [p for text in texts for p in renderer.pieces((Segment(text=text), Segment(image=photo(rng))))]
    for number, (_, row) in enumerate(pack_contents(pieces, spec, ROW_TOKENS)):
        batch = mask(row, spec, seed=0, epoch=0, mlm_ratio=MLM_RATIO, mae_ratio=MAE_RATIO)
        (Path(folder) / f"{number:03d}.row").write_bytes(to_bytes(batch))


def photo(rng: np.random.Generator) -> bytes:
    file = io.BytesIO()
    pixels = rng.integers(0, 255, (*rng.integers(60, 280, 2), 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def on_workers(main: Callable, world: int, *args: Any, apart: bool = False) -> list[Any]:
    """What `main(*args)` returns on each of `world` processes: one group, or `apart`, each a group of its own at the same time."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DS_ACCELERATOR"] = "cpu"
        multiprocessing.set_forkserver_preload(IMPORTED_ONCE)
        mp.start_processes(_worker, (world, apart, folder, main, args), nprocs=world, start_method="forkserver")
        return [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(world)]


def _worker(process: int, world: int, apart: bool, folder: str, main: Callable, args: tuple) -> None:
    rank, size, group = (0, 1, process) if apart else (process, world, 0)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    patience = timedelta(minutes=5)
    dist.init_process_group("gloo", f"file://{folder}/group{group}", rank=rank, world_size=size, timeout=patience)
    Meetings.replace()
    torch.save(main(*args), f"{folder}/{process}.pt")
    dist.barrier()
    dist.destroy_process_group()


def train_pass(folder: str) -> dict[str, float]:
    """Tokens a second of the real loop in its best step, this worker's CPU seconds a step, and where the seconds of others go."""
    from cluster import collectives
    from cluster.deepspeed_engine import DeepSpeedEngine
    from cluster.engine import EngineConfig
    from moca_core.attention import set_attention
    from moca_core.backbone import prepare as prepare_model
    from moca_core.objective.pretraining import MaskedModelling
    from pipelines.steps.pretrain import PretrainConfig
    from pipelines.training.loop import train

    torch.manual_seed(0)
    spec = read_spec(folder)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    prepare_model(model)
    set_attention(model, "bidirectional")
    objective = MaskedModelling(model, spec)
    rows = [path.read_bytes() for path in sorted(Path(folder).glob("*.row"))]
    costs = np.array([spec.flops(np.diff(r.stream.cu_seqlens), r.stream.grid_thw) for r in map(from_bytes, rows)])
    engine = DeepSpeedEngine(objective, EngineConfig("fp32", zero_stage=2, max_grad_norm=1.0))
    rank, world = dist.get_rank(), dist.get_world_size()
    metrics: list[dict[str, float]] = []

    def run(first: int, steps: int) -> list[dict[str, float]]:
        span = range(first, first + steps)
        plan = row_plan(costs, ROWS_PER_STEP, span, rank, world, seed=0)
        config = PretrainConfig(steps=WARM_UP + 2 * STEPS, learning_rate=1e-5)
        train(
            engine,
            objective,
            decoded(plan, rows, span),
            config,
            sum_over_ranks=collectives.all_reduce_sum,
            after_step=lambda report: metrics.append(report.metrics),
        )
        return metrics[-steps:]

    run(0, WARM_UP)
    cpu_s = time.process_time()
    timed = run(WARM_UP, STEPS)
    cpu_s = (time.process_time() - cpu_s) / STEPS
    with watched(engine) as clock:
        again = run(WARM_UP + STEPS, STEPS)
    whole_s = sum(found["tokens"] / found["tokens_per_s"] for found in again)
    parts = {name: clock[name] / STEPS for name in ("compute", "straggling", "exchange", "optimizer")}
    parts["data"] = sum(found["data_wait"] * found["tokens"] / found["tokens_per_s"] for found in again) / STEPS
    parts["rest"] = whole_s / STEPS - sum(parts.values())
    tokens_per_s = max(found["tokens_per_s"] for found in timed)
    return {"tokens_per_s": tokens_per_s, "cpu_s": cpu_s, "link_bytes": clock["link_bytes"] / STEPS, **parts}


def decoded(plan: list[dict], rows: list[bytes], steps: range) -> Iterator[tuple[int, list[Any]]]:
    for step in steps:
        yield step, [from_bytes(rows[address["row"]]) for address in plan if address["step"] == step]


class Meetings:
    """Collectives of torch.distributed, replaced before DeepSpeed takes hold of them. While `clock` counts, ranks meet at a barrier
    before each: the wait is straggling, what follows is exchange."""

    clock: Counter | None = None

    @classmethod
    def replace(cls) -> None:
        for name in COLLECTIVES:
            setattr(dist, name, partial(cls.meet, name, getattr(dist, name)))

    @classmethod
    def meet(cls, name: str, collective: Callable, *args: Any, async_op: bool = False, **kwargs: Any) -> Any:
        if cls.clock is None:
            return collective(*args, async_op=async_op, **kwargs)
        started = time.perf_counter()
        dist.barrier()
        met = time.perf_counter()
        handle = collective(*args, async_op=True, **kwargs)
        handle.wait()
        cls.clock["straggling"] += met - started
        cls.clock["exchange"] += time.perf_counter() - met
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        cls.clock[name] += max(tensor.numel() * tensor.element_size() for tensor in tensors)
        return handle if async_op else None


@contextlib.contextmanager
def watched(engine: Any) -> Iterator[Counter]:
    """Seconds by what they go to, and "link_bytes" at the end."""
    clock = Meetings.clock = Counter()

    def timed(part: str, original: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            started, outside = time.perf_counter(), clock["straggling"] + clock["exchange"]
            result = original(*args, **kwargs)
            apart = clock["straggling"] + clock["exchange"] - outside
            clock[part] += time.perf_counter() - started - apart
            return result

        return call

    for name, part in (("forward", "compute"), ("backward", "compute"), ("step", "optimizer")):
        setattr(engine, name, timed(part, getattr(engine, name)))
    yield clock
    Meetings.clock = None
    ring = (dist.get_world_size() - 1) / dist.get_world_size()
    clock["link_bytes"] = ring * sum(times * clock[name] for name, times in COLLECTIVES.items())


def link_rate() -> float:
    """Bytes a second that pass through a worker's link in an all-reduce of 64 MB."""
    tensor, seconds = torch.ones(2**24), []
    for _ in range(4):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(tensor)
        seconds.append(time.perf_counter() - started)
    world = dist.get_world_size()
    return 2 * (world - 1) / world * 4 * tensor.numel() / min(seconds)


def traffic(settings: list[tuple[int, str, int]]) -> list[float]:
    """Bytes a weight through a worker's link in a step in bf16, of each (stage, gradient exchange, micro-batches)."""
    from cluster.engine import EngineConfig, open_engine

    found, width = [], 64
    for stage, exchange, micro_batches in settings:
        module = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(4)))
        engine = open_engine(module, EngineConfig("bf16", zero_stage=stage, gradient_exchange=exchange))
        with watched(engine) as clock:
            for number in range(1, micro_batches + 1):
                loss = engine.forward(torch.ones(2, width, dtype=torch.bfloat16)).float().square().sum()
                engine.backward(loss, last=number == micro_batches)
            engine.step(1e-3)
        engine.close()
        found.append(clock["link_bytes"] / (4 * width**2))
    return found
