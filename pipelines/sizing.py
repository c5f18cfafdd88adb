"""How long a step of pre-training takes, calculated, and the settings that are fastest of those that fit.

Closed forms over `Constants`, each with its source; nothing was measured on a GPU, and benchmarks/scaling.py prints how much hangs on
what is assumed. Traffic and memory are those of the engines of cluster/ in bf16: gradients are summed in fp32, by all-reduce at stages
0 to 2 and by reduce-scatter at 3 (counted in benchmarks/scaling.py).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import numpy as np

from moca_core.spec import BackboneSpec
from pipelines.memory import (
    WORKING_BYTES,
    Checkpointing,
    MicroBatch,
    Sharing,
    Weights,
    activation_bytes,
    state_bytes,
    step_bytes,
)
from pipelines.training.plan import row_plan

Exchange = Literal["step", "micro_batch"]
GPUS_PER_NODE = 8
MLM_RATIO, MAE_RATIO = 0.4, 0.5  # the paper's, for 3B
PLANNED_STEPS = 32  # over which the balance of a plan is looked at: a bucket of it


@dataclass(frozen=True)
class Gpu:
    """Of the makers' data sheets: dense bf16 products, memory, and links in one direction."""

    name: str
    peak_flops_per_s: float
    memory_bytes: float
    memory_bytes_per_s: float
    node_link_bytes_per_s: float = 450e9  # NVLink 4
    network_bytes_per_s: float = 50e9  # one card of 400 Gb/s per GPU


H200 = Gpu("H200", 989e12, 141e9, 4.8e12)
H100 = Gpu("H100", 989e12, 80e9, 3.35e12)


def _constant(value: float, source: str) -> float:
    return field(default=value, metadata={"source": source})


@dataclass(frozen=True)
class Constants:
    """What the closed forms multiply by. The first word of a source says whether it was measured, published or assumed."""

    achieved: float = _constant(0.40, "published: Qwen2.5-VL-7B 30-40 % (lmms-engine), Llama 8B 33-39 % (torchtitan)")
    selective_work: float = _constant(1.17, "measured: benchmarks/step.py on a CPU, none over selective")
    full_work: float = _constant(1.31, "measured: benchmarks/step.py on a CPU, none over full; by FLOPs it is 4/3")
    stage3_work: float = _constant(
        1.14, "published: ZeRO-2 over 3, LLaMA-7B, 8 A100 (flashattn.dev, weak), traffic in it"
    )
    link_share: float = _constant(0.8, "assumed: of a link's rate, for a large collective")
    hop_s: float = _constant(10e-6, "assumed: latency of a collective for every further GPU of a node, then node")
    hidden: float = _constant(0.5, "assumed: of compute, what hides stage 3's traffic between nodes; others hide none")
    data_tokens_per_s: float = _constant(52_352, "measured: benchmarks/data_throughput.py, one core")
    data_cores: float = _constant(
        4, "assumed: cores a GPU that prepare its rows, as the recipes' data_tasks_per_worker"
    )
    optimizer_bytes: float = _constant(30, "counted: AdamW, a weight: gradient, masters, moments, read and written")
    working_bytes: float = _constant(WORKING_BYTES, "assumed: CUDA, NCCL, one layer's gradients, fragmentation")


@dataclass(frozen=True)
class Rows:
    """Packed rows: mean tokens, those of them of images, mean FLOPs of a pass forward and backward, and what the plan balances."""

    tokens: float
    image_tokens: float
    flops: float
    costs: tuple[float, ...]


@dataclass(frozen=True)
class Job:
    """`rows_per_step` rows over `gpus` GPUs, one row at a time on each."""

    spec: BackboneSpec
    weights: int
    rows: Rows
    gpu: Gpu
    gpus: int
    rows_per_step: int

    @property
    def micro_batches(self) -> int:
        return -(-self.rows_per_step // self.gpus)


@dataclass(frozen=True)
class Settings:
    """As `cluster` in a recipe has them: a ClusterConfig will do as well."""

    zero_stage: Literal[0, 1, 2, 3]
    gradient_exchange: Exchange
    activation_checkpointing: Checkpointing


@dataclass(frozen=True)
class Prediction:
    """`parts`: the seconds of a step, one after the other."""

    job: Job
    settings: Settings
    memory_bytes: float
    parts: dict[str, float]

    @property
    def step_s(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_per_s(self) -> float:
        return self.job.rows_per_step * self.job.rows.tokens / self.step_s

    @property
    def mfu(self) -> float:
        peak_flops = self.job.gpus * self.job.gpu.peak_flops_per_s * self.step_s
        return self.job.rows_per_step * self.job.rows.flops / peak_flops


def fastest(job: Job, constants: Constants = Constants()) -> Prediction | None:
    """The best settings that the GPU's memory holds, None if it holds none. Of equals, the lower stage."""
    fitting = [p for p in (predict(job, s, constants) for s in choices(job)) if p.memory_bytes <= job.gpu.memory_bytes]
    return min(fitting, key=lambda p: p.step_s, default=None)


def choices(job: Job) -> Iterator[Settings]:
    for stage in (0, 1, 2, 3):
        for exchange in ("step", "micro_batch") if stage > 1 and job.micro_batches > 1 else ("step",):
            for checkpointing in ("none", "selective", "full"):
                yield Settings(stage, exchange, checkpointing)


def predict(job: Job, settings: Settings, constants: Constants = Constants()) -> Prediction:
    stage, again = settings.zero_stage, settings.activation_checkpointing
    compute_s = job.micro_batches * row_s(job, again, constants)
    each = stage == 3 or settings.gradient_exchange == "micro_batch"
    straggling = straggler(job.rows.costs, job.rows_per_step, job.gpus, each_micro_batch=each)
    link_bytes, collectives = exchanged(job, settings)
    traffic_s = transfer_s(link_bytes, job.gpu, job.gpus, constants)
    if stage == 3:
        traffic_s = max(0.0, traffic_s - constants.hidden * compute_s) if job.gpus > GPUS_PER_NODE else 0.0
    parts = {
        "compute": compute_s,
        "stage 3": compute_s * (constants.stage3_work - 1) if stage == 3 else 0.0,
        "straggling": compute_s * (straggling - 1),
        "exchange": traffic_s,
        "latency": collectives * latency_s(job.gpus, constants),
        "optimizer": optimizer_s(job, stage, constants),
        "data": max(0.0, data_s(job, constants) - compute_s),
    }
    return Prediction(job, settings, memory_bytes(job, settings) + constants.working_bytes, parts)


def memory_bytes(job: Job, settings: Settings) -> float:
    """Of a GPU, but for what CUDA takes itself."""
    weights = Weights(job.weights, job.weights, job.spec.vocab_size * job.spec.text_hidden)
    adds_up = settings.gradient_exchange == "step" and job.micro_batches > 1
    sharing = Sharing(settings.zero_stage, job.gpus, adds_up)
    state = state_bytes(weights, "bf16", sharing)
    words, images = job.rows.tokens - job.rows.image_tokens, job.rows.image_tokens
    row = MicroBatch(job.rows.tokens, images, MLM_RATIO * words, MAE_RATIO * images)
    activations = activation_bytes(job.spec, row, settings.activation_checkpointing)
    return step_bytes(state, activations, weights, sharing, job.micro_batches)


def weight_count(spec: BackboneSpec, *, tied: bool, decoder_layers: int = 1) -> int:
    """Weights that pre-training trains: both towers, the embedding (and the head, if it is another), the MAE decoder."""
    towers = spec.text_layers * spec.text_params_per_layer + spec.vision_layers * spec.vision_params_per_layer
    embeddings = (1 if tied else 2) * spec.vocab_size * spec.text_hidden
    painting = spec.text_hidden * spec.group_size * spec.patch_values
    return towers + embeddings + spec.merger_params + decoder_layers * spec.text_params_per_layer + painting


def row_s(job: Job, checkpointing: Checkpointing, constants: Constants) -> float:
    """Products of matrices of a row, forward, backward and again where checkpointing asks for it."""
    again = {"none": 1.0, "selective": constants.selective_work, "full": constants.full_work}[checkpointing]
    return job.rows.flops * again / (constants.achieved * job.gpu.peak_flops_per_s)


def optimizer_s(job: Job, stage: int, constants: Constants) -> float:
    """AdamW over a rank's share of the weights: as fast as memory is."""
    share = job.gpus if stage else 1
    return constants.optimizer_bytes * job.weights / share / job.gpu.memory_bytes_per_s


def data_s(job: Job, constants: Constants) -> float:
    """Of the cores that prepare a GPU's rows of a step, ahead of it."""
    return job.micro_batches * job.rows.tokens / (constants.data_tokens_per_s * constants.data_cores)


def exchanged(job: Job, settings: Settings) -> tuple[float, int]:
    """(bytes that pass through every GPU's link in a step, number of collectives one after the other).

    An all-reduce passes everything twice, an all-gather or a reduce-scatter once. Gradients are fp32, weights bf16.
    """
    ring = (job.gpus - 1) / job.gpus
    times = job.micro_batches if settings.gradient_exchange == "micro_batch" else 1
    if settings.zero_stage == 3:
        gathers = 2 * job.micro_batches  # forward, and again backward
        layers = job.spec.text_layers + job.spec.vision_layers
        return ring * job.weights * (2 * gathers + 4 * times), layers * (gathers + times)
    buckets = math.ceil(job.weights / 200e6)
    gathered = 2 if settings.zero_stage else 0
    return ring * job.weights * (2 * 4 * times + gathered), buckets * (times + bool(gathered))


def transfer_s(link_bytes: float, gpu: Gpu, gpus: int, constants: Constants) -> float:
    """Over NVLink within a node; between nodes at the network's rate."""
    rate = gpu.node_link_bytes_per_s if gpus <= GPUS_PER_NODE else gpu.network_bytes_per_s
    return link_bytes / (rate * constants.link_share)


def latency_s(gpus: int, constants: Constants) -> float:
    """Of one collective in a ring: hops within a node, then over nodes."""
    return constants.hop_s * (min(gpus, GPUS_PER_NODE) - 1 + max(0, gpus // GPUS_PER_NODE - 1))


def straggler(costs: tuple[float, ...], rows_per_step: int, ranks: int, *, each_micro_batch: bool) -> float:
    """Work of the slowest rank over the mean, as the plan deals these rows; summed over micro-batches if ranks meet at each of them."""
    work = _dealt(costs, rows_per_step, math.gcd(ranks, rows_per_step))  # of more ranks than rows, some rest
    slowest = work.max(0).sum() if each_micro_batch else work.sum(2).max(0).sum()
    return float(slowest / work.mean(0).sum())


@lru_cache(maxsize=64)
def _dealt(costs: tuple[float, ...], rows_per_step: int, ranks: int) -> np.ndarray:
    """[ranks, steps, micro-batches]"""
    known = np.array(costs)
    plans = [row_plan(known, rows_per_step, range(PLANNED_STEPS), rank, ranks, seed=0) for rank in range(ranks)]
    rows = [[address["row"] for address in plan] for plan in plans]
    return known[rows].reshape(ranks, PLANNED_STEPS, -1)
