"""Scaling of pre-training: one and two workers measured here, 8 to 512 GPUs calculated, with the settings to write in a recipe.

    python benchmarks/scaling.py                      all of it; the measured part takes minutes
    python benchmarks/scaling.py --calculate --size 7b --gpu H200 --gpus 32

Measured: the real loop under DeepSpeed, one worker and two taken in turns, the same rows and steps; the best step counts. Also two
workers that know nothing of each other, which is what the machine itself loses when both its cores work. Then where a step's seconds
go, and the bytes that every ZeRO stage passes over a link, against those that pipelines/sizing.py counts.
Calculated (pipelines/sizing.py): the fastest settings that fit, for rows of 8,192 tokens of the synthetic mix of benchmarks/packing.py and
64 rows a step, as the recipes moca_3b and moca_7b have it; above 64 GPUs also for a row on each. Nothing of it was measured on a GPU.
"""

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass, fields, replace

import numpy as np
from packing import SPEC_3B, size, split, synthetic

from moca_core.data.packing import pack_evenly
from moca_core.flops import head_flops, mae_flops
from moca_core.spec import BackboneSpec
from pipelines.sizing import (
    H100,
    H200,
    Constants,
    Gpu,
    Job,
    Prediction,
    Rows,
    Settings,
    exchanged,
    fastest,
    predict,
    weight_count,
)

GPUS = (8, 16, 32, 64, 128, 256, 512)
MAX_TOKENS, ROW_TOKENS, ROWS_PER_STEP = 2048, 8192, 64  # of the recipes
CORPUS_ROWS = 2**16
MLM_RATIO, MAE_RATIO = 0.4, 0.5
DOCUMENTS = 4000
ALL_CARDS = 8  # of a node may carry one collective, where the network lets NCCL's rings use them all
LEGEND = """
In a recipe: cluster.num_workers (GPUs), cluster.gpus_per_worker=1, pretrain.rows_per_step (rows), cluster.zero_stage,
cluster.gradient_exchange, cluster.activation_checkpointing. Efficiency: tokens/s of a GPU over those in the first line.
All cards: tokens/s, with settings of its own, where the cards of a node's GPUs carry every collective together; all else
is for a network that gives a collective the rate of one card."""
SPEC_7B = replace(
    SPEC_3B, vocab_size=152_064, text_hidden=3584, text_layers=28, text_width=3584, text_kv_width=512, text_intermediate=18_944,
    merger_params=5120 * 5120 + 5120 * 3584,
)  # fmt: skip


@dataclass(frozen=True)
class Model:
    spec: BackboneSpec
    tied: bool

    def job(self, rows: Rows, gpu: Gpu, gpus: int, rows_per_step: int) -> Job:
        return Job(self.spec, weight_count(self.spec, tied=self.tied), rows, gpu, gpus, rows_per_step)


MODELS = {"3b": Model(SPEC_3B, tied=True), "7b": Model(SPEC_7B, tied=False)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="this part alone")
    parser.add_argument("--calculate", action="store_true", help="this part alone")
    parser.add_argument("--size", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--gpu", nargs="+", choices=("H200", "H100"), default=["H200", "H100"])
    parser.add_argument("--gpus", nargs="+", type=int, default=GPUS)
    parser.add_argument("--rounds", type=int, default=3, help="one and two workers in turns, so many times")
    options = parser.parse_args()
    if not options.measure:
        calculate(options)
    if not options.calculate:
        measure(options.rounds)


# Calculated


def calculate(options: argparse.Namespace) -> None:
    constants = Constants()
    print("Constants:")
    for constant in fields(constants):
        print(f"  {constant.name:18}{getattr(constants, constant.name):>12.6g}  {constant.metadata['source']}")
    for name in options.size:
        rows = packed_rows(MODELS[name].spec)
        print(
            f"\n{name}: {weight_count(MODELS[name].spec, tied=MODELS[name].tied) / 1e9:.2f} G weights; rows of {rows.tokens:.0f} tokens, "
            f"{rows.image_tokens / rows.tokens:.0%} of images, {rows.flops / 1e12:.0f} TFLOP forward and backward"
        )
        for gpu in (gpu for gpu in (H200, H100) if gpu.name in options.gpu):
            table(MODELS[name], rows, gpu, options.gpus, constants)
    print(LEGEND)


def packed_rows(spec: BackboneSpec) -> Rows:
    """Rows of the synthetic mix; their costs are drawn with replacement until they are as many as a corpus has."""
    rng = np.random.default_rng(0)
    pieces = [piece for doc in synthetic(DOCUMENTS, rng) for piece in split(doc, MAX_TOKENS)]
    costs = [towers_flops(spec, [piece]) for piece in pieces]
    packs = [[pieces[i] for i in members] for members in pack_evenly([size(p) for p in pieces], costs, ROW_TOKENS)]
    towers = [towers_flops(spec, pack) for pack in packs]
    flops = [tower + heads_flops(spec, pack) for tower, pack in zip(towers, packs, strict=True)]
    return Rows(
        tokens=float(np.mean([sum(map(size, pack)) for pack in packs])),
        image_tokens=float(np.mean([sum(map(images, pack)) for pack in packs])),
        flops=float(np.mean(flops)),
        costs=tuple(rng.choice(towers, CORPUS_ROWS).tolist()),
    )


def images(piece: list) -> int:
    return sum(part.image for part in piece)


def towers_flops(spec: BackboneSpec, pieces: list) -> float:
    """As the step `pack` counts them, with square images."""
    sides = [round((part.image * spec.group_size) ** 0.5) for piece in pieces for part in piece if part.image]
    return spec.flops([size(piece) for piece in pieces], [(1, side, side) for side in sides])


def heads_flops(spec: BackboneSpec, pieces: list) -> float:
    """Language head at masked text tokens, MAE decoder over sequences with images."""
    masked_text = round(MLM_RATIO * sum(size(piece) - images(piece) for piece in pieces))
    shown = [(size(piece), round(MAE_RATIO * images(piece))) for piece in pieces if images(piece)]
    painting = mae_flops(spec, *map(list, zip(*shown, strict=True)), 1).trained() if shown else 0.0
    return head_flops(spec, masked_text).trained() + painting


def table(model: Model, rows: Rows, gpu: Gpu, counts: list[int], constants: Constants) -> None:
    print(f"\n{gpu.name}, {gpu.memory_bytes / 1e9:.0f} GB, {gpu.network_bytes_per_s / 1e9:.0f} GB/s of network a GPU")
    print(
        f"{'GPUs':>5}{'rows':>6}{'stage':>7} {'exchange':12}{'checkpointing':14}{'GB':>5}{'tokens/s':>11}{'MFU':>6}"
        f"{'efficiency':>11}{'all cards':>11}  seconds of a step"
    )
    first = None
    for gpus in counts:
        if gpus > ROWS_PER_STEP:
            print(
                f"{'':18} {ROWS_PER_STEP} rows would keep {ROWS_PER_STEP} of {gpus} GPUs at work; a row on each is a batch "
                f"of {gpus * rows.tokens / 1e6:.1f} M tokens, {gpus / ROWS_PER_STEP:g} times the recipe's:"
            )
        job = model.job(rows, gpu, gpus, max(gpus, ROWS_PER_STEP))
        best = fastest(job, constants)
        if best is None:
            print(f"{gpus:5}{job.rows_per_step:6}   nothing fits")
            continue
        first = first or best
        wide = replace(job, gpu=replace(gpu, network_bytes_per_s=ALL_CARDS * gpu.network_bytes_per_s))
        show(best, first, fastest(wide, constants))
        if gpus in (8, 64, 512):
            print(f"{'':18} {sensitivity(best, constants)}")


def show(best: Prediction, first: Prediction, wide: Prediction) -> None:
    job, chosen = best.job, best.settings
    share = (best.tokens_per_s / job.gpus) / (first.tokens_per_s / first.job.gpus)
    parts = ", ".join(f"{part} {seconds:.2f}" for part, seconds in best.parts.items() if seconds >= 0.005)
    print(
        f"{job.gpus:5}{job.rows_per_step:6}{chosen.zero_stage:7} {chosen.gradient_exchange:12}{chosen.activation_checkpointing:14}"
        f"{best.memory_bytes / 1e9:5.0f}{best.tokens_per_s:11,.0f}{best.mfu:6.0%}{share:11.0%}{wide.tokens_per_s:11,.0f}  {parts}"
    )


def sensitivity(best: Prediction, constants: Constants) -> str:
    """What a fifth less of the two that matter most does, to these settings and to the choice."""
    job = best.job
    gpu = replace(
        job.gpu,
        network_bytes_per_s=0.8 * job.gpu.network_bytes_per_s,
        node_link_bytes_per_s=0.8 * job.gpu.node_link_bytes_per_s,
    )
    cases = {
        "achieved": (job, replace(constants, achieved=0.8 * constants.achieved)),
        "links": (replace(job, gpu=gpu), constants),
    }
    said = []
    for name, (worse_job, worse) in cases.items():
        same = predict(worse_job, best.settings, worse)
        other = fastest(worse_job, worse).settings
        choice = "same settings" if other == best.settings else f"better then: {words(other)}"
        said.append(f"{name} -20 %: tokens/s {same.tokens_per_s / best.tokens_per_s - 1:+.0%}, {choice}")
    return "; ".join(said)


def words(settings: Settings) -> str:
    return f"stage {settings.zero_stage}, {settings.gradient_exchange}, {settings.activation_checkpointing}"


# Measured


def measure(rounds: int) -> None:
    from scaling_ranks import link_rate, on_workers, prepare, traffic, train_pass

    print(
        f"\nMeasured here: {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, one thread a worker, stage 2, fp32",
        flush=True,
    )
    ways = {"1 worker": (1, False), "2 workers": (2, False), "2 apart": (2, True)}
    passes: dict[str, list[list[dict[str, float]]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        prepare(folder)
        for number in range(rounds):
            for way, (world, apart) in ways.items():
                passes[way].append(on_workers(train_pass, world, folder, apart=apart))
                print(f"  round {number + 1}, {way}: {speed(passes[way][-1], apart):.0f} tokens/s", flush=True)
    best = {way: max(passes[way], key=lambda ranks, way=way: speed(ranks, ways[way][1])) for way in ways}
    rate = {way: speed(best[way], ways[way][1]) for way in ways}
    print(f"{'':10}{'tokens/s':>10}{'ratio':>8}  milliseconds of a step, mean of the workers")
    for way, ranks in best.items():
        names = [name for name in ranks[0] if name not in ("tokens_per_s", "cpu_s", "link_bytes")]
        parts = ", ".join(f"{name} {1e3 * np.mean([rank[name] for rank in ranks]):.0f}" for name in names)
        print(f"{way:10}{rate[way]:10.0f}{rate[way] / rate['1 worker']:8.2f}  {parts}")
    cpu_s = {
        way: min(sum(rank["cpu_s"] for rank in ranks) for ranks in passes[way]) for way in ("1 worker", "2 workers")
    }
    print(
        f"efficiency {rate['2 workers'] / rate['1 worker'] / 2:.0%}; of what the two cores give apart "
        f"{rate['2 workers'] / rate['2 apart']:.0%}; CPU seconds a step of all workers {cpu_s['1 worker']:.2f} and "
        f"{cpu_s['2 workers']:.2f}, {cpu_s['1 worker'] / cpu_s['2 workers']:.0%}, which other load hardly changes"
    )
    link_bytes, link = best["2 workers"][0]["link_bytes"], min(on_workers(link_rate, 2))
    print(
        f"exchange: {link_bytes / 1e6:.1f} MB a step over a link of {link / 1e9:.2f} GB/s: {1e3 * link_bytes / link:.0f} ms by that"
    )
    sys.exit(not same_traffic(on_workers, traffic))


def speed(ranks: list[dict[str, float]], apart: bool) -> float:
    """Tokens per second of all workers; in one group each reports those of all."""
    rates = [rank["tokens_per_s"] for rank in ranks]
    return sum(rates) if apart else min(rates)


def same_traffic(on_workers, traffic) -> bool:
    """Whether every stage passes over a link what `exchanged` counts."""
    settings = [
        (0, "step", 2),
        (1, "step", 2),
        (2, "step", 2),
        (2, "micro_batch", 2),
        (3, "step", 2),
        (3, "micro_batch", 2),
    ]
    found, agree = on_workers(traffic, 2, settings)[0], True
    print(f"{'bytes a weight over a link':30}{'counted':>9}{'measured':>10}   (2 workers, 2 micro-batches, bf16)")
    for (stage, exchange, _), measured in zip(settings, found, strict=True):
        job = Job(SPEC_3B, 1, Rows(1, 0, 1, ()), H200, 2, 4)
        counted = exchanged(job, Settings(stage, exchange, "none"))[0]
        agree &= abs(measured - counted) <= 0.05 * counted
        print(f"stage {stage}, {exchange:20}{counted:9.2f}{measured:10.2f}")
    print("PASS" if agree else "FAIL")
    return agree


if __name__ == "__main__":
    main()
