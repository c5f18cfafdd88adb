"""Demands against machines: a line of arithmetic for each, and which of them can never be met."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from cluster.machines import Machine
from cluster.placement import places
from pipelines.preflight.demand import EMBEDDING, TRAINING, Demand

FEEDING_CPUS = {"training": 0.25, "embedding": 1.0}  # of the tasks of pipelines/training/stream.py, of cluster/batch.py


@dataclass(frozen=True)
class Finding:
    """One thing that a step needs. `met` is None where nobody can know yet."""

    step: str
    what: str
    met: bool | None

    def __str__(self) -> str:
        mark = {True: "ok", False: "NO", None: "?"}[self.met]
        return f"  {mark:<3}{self.step:<10}{self.what}"


def check(demands: Iterable[Demand], machines: list[Machine], most: dict[str, float] | None) -> list[Finding]:
    """`most`: what an autoscaler may bring the cluster to. What it would bring cannot be looked at, so only numbers are held to it."""
    findings = []
    for demand in demands:
        there = fitting(demand, machines)
        seats = [places(machine.resources, demand.workers, demand.cpus, demand.gpus) for machine in there]
        room = sum(seats)
        findings.append(_room(demand, there, room, most))
        if starved := _starved(demand, machines, room):
            findings.append(replace(starved, met=None) if most else starved)
        if room < demand.fewest or not demand.device:
            continue
        taken = [(machine, min(seat, demand.workers)) for machine, seat in zip(there, seats, strict=True) if seat]
        findings += [_device(demand, taken), *_hosts(demand, taken)]
    return findings


def fitting(demand: Demand, machines: list[Machine]) -> list[Machine]:
    """Those that the step's workers may be placed on (cluster/placement.py)."""
    labelled = [machine for machine in machines if machine.training]
    trains = demand.step in (*TRAINING, *EMBEDDING)
    return labelled if trains and not demand.gpus and labelled else machines


def _room(demand: Demand, there: list[Machine], room: int, most: dict[str, float] | None) -> Finding:
    each = workers_of(demand)
    has = f"{sum(m.cpus for m in there):g} CPU, {sum(m.gpus for m in there):g} GPU on {len(there)} machine(s): room for {room}"
    if room >= demand.fewest or not most:
        return Finding(demand.step, f"{each}; {has}", room >= demand.fewest)
    enough = most.get("CPU", 0) >= demand.fewest * demand.cpus and most.get("GPU", 0) >= demand.fewest * demand.gpus
    grown = f"{most.get('CPU', 0):g} CPU, {most.get('GPU', 0):g} GPU when it has grown"
    return Finding(demand.step, f"{each}; {has}; {grown}", None if enough else False)


def _starved(demand: Demand, machines: list[Machine], room: int) -> Finding | None:
    """Workers that take every CPU wait for ever for the tasks that feed them."""
    feeding = FEEDING_CPUS["training" if demand.step in TRAINING else "embedding"]
    taken = min(room, demand.workers) * demand.cpus
    spare = sum(machine.cpus for machine in machines) - taken
    if demand.step not in (*TRAINING, *EMBEDDING) or room < demand.fewest or spare >= feeding:
        return None
    what = (
        f"CPU for the tasks that feed them: workers take {taken:g} and leave {spare:g}; lower cluster.cpus_per_worker"
    )
    return Finding(demand.step, what, False)


def _device(demand: Demand, taken: list[tuple[Machine, int]]) -> Finding:
    """A worker's GPU; without GPUs the memory of a machine, for all workers that it may get."""
    parts = parts_of(demand)
    if demand.gpus:
        known = [machine for machine, _ in taken if machine.gpu_bytes]
        if not known:
            return Finding(
                demand.step, f"GPU memory: {giga(demand.device)} GB a worker ({parts}); of GPUs unknown", None
            )
        least = min(known, key=lambda machine: machine.gpu_bytes)
        what = f"GPU memory: {giga(demand.device)} GB a worker ({parts}); {least.gpu_name} has {giga(least.gpu_bytes)}"
        return Finding(demand.step, what, demand.device / demand.gpus <= least.gpu_bytes)
    machine, workers = min(taken, key=lambda pair: pair[0].memory_bytes - pair[1] * demand.device)
    what = (
        f"memory: {workers} x {giga(demand.device)} GB ({parts}) of {giga(machine.memory_bytes)} on {machine.address}"
    )
    return Finding(demand.step, what, workers * demand.device <= machine.memory_bytes)


def _hosts(demand: Demand, taken: list[tuple[Machine, int]]) -> Iterable[Finding]:
    """What a machine must have for the workers that it may get: memory, Ray's object store, disk."""
    for name, size, has in (
        ("host memory", demand.host, "memory_bytes"),
        ("object store", demand.store, "object_store_bytes"),
    ):
        machine, workers = min(taken, key=lambda pair: getattr(pair[0], has) - pair[1] * size)
        there = getattr(machine, has)
        if size:
            what = f"{name}: {workers} x {giga(size)} GB of {giga(there)} on {machine.address}"
            yield Finding(demand.step, what, workers * size <= there)
    machine = min((machine for machine, _ in taken), key=lambda machine: machine.scratch_bytes)
    what = f"disk: {giga(demand.scratch)} GB for a checkpoint and the model; {giga(machine.scratch_bytes)} free on {machine.address}"
    yield Finding(demand.step, what, demand.scratch <= machine.scratch_bytes)


def workers_of(demand: Demand) -> str:
    each = f"{demand.workers} worker(s) of {demand.cpus:g} CPU" + (f", {demand.gpus:g} GPU" if demand.gpus else "")
    return each + (f" ({demand.fewest} will do)" if demand.fewest < demand.workers else "")


def parts_of(demand: Demand) -> str:
    """What its memory is made of, in GB, but for what is too little to name."""
    return ", ".join(f"{name} {giga(size)}" for name, size in demand.parts.items() if size >= demand.device / 200)


def giga(size: float) -> str:
    return f"{size / 1e9:.3g}"
