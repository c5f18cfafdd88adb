"""Which machines do what. Training and embedding run where the GPUs are; on a cluster without any, on machines that carry the label
moca.role=training, or anywhere where none does. What wants CPUs alone goes to the other machines first.
"""

import time
from typing import Any

from cluster.session import on_a_cluster, start_timeout_s

LABEL, TRAINING = "moca.role", "training"  # ray start --labels moca.role=training


def on_cpus() -> dict[str, Any]:
    """Options of a Ray or Ray Data task that wants CPUs alone: machines without GPUs and without the label first, then all.

    Ray's own default avoids machines with GPUs while others have room; Ray Data's, to spread tasks, does not.
    """
    anywhere: list[dict[str, Any]] = [{"label_selector": {}}]
    return {
        "scheduling_strategy": "DEFAULT",
        "label_selector": {LABEL: f"!{TRAINING}"},
        "fallback_strategy": anywhere,
    }


def for_training(gpus: float) -> dict[str, Any]:
    """Options of a task, actor or worker that trains or embeds with this share of a GPU."""
    return {"label_selector": {LABEL: TRAINING}} if not gpus and any(map(is_for_training, _alive())) else {}


def require_room(workers: int, cpus: float, gpus: float, *, training: bool = False) -> None:
    """ValueError unless the cluster's machines can hold that many workers; Ray itself would wait for ever.

    A cluster with an autoscaler is asked to grow and given `worker_start_timeout_s`. What other work occupies now does not matter: it ends.
    With `training` only machines for training count.
    """
    import ray

    def room() -> int:
        return sum(places(m["Resources"], workers, cpus, gpus) for m in _alive() if not labelled or is_for_training(m))

    labelled = training and bool(for_training(gpus))
    deadline = time.monotonic() + (start_timeout_s() if on_a_cluster() else 0)
    if room() < workers and on_a_cluster():
        from ray.autoscaler.sdk import request_resources

        request_resources(bundles=[{"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}] * workers)
        while room() < workers and time.monotonic() < deadline:
            time.sleep(1)
        request_resources(bundles=[])  # the group's own demand holds the machines from here on
    if room() < workers:
        there = ray.cluster_resources()
        where = f"{there.get('CPU', 0):g} CPU and {there.get('GPU', 0):g} GPU on {len(_alive())} machine(s)"
        if labelled:
            where += f", room for {room()} of them on {sum(map(is_for_training, _alive()))} machine(s) labelled {LABEL}={TRAINING}"
        raise ValueError(
            f"no room for {workers} worker(s) with {cpus:g} CPU and {gpus:g} GPU each: the cluster has {where}; "
            "lower num_workers, cpus_per_worker or gpus_per_worker"
        )


def places(resources: dict[str, float], most: int, cpus: float, gpus: float) -> int:
    """How many workers with that share each a machine has room for, when nothing else runs there."""
    shares = [resources.get(kind, 0) / share for kind, share in (("CPU", cpus), ("GPU", gpus)) if share]
    return int(min(shares, default=most) + 1e-6)


def _alive() -> list[dict[str, Any]]:
    import ray

    return [machine for machine in ray.nodes() if machine["Alive"]]


def is_for_training(machine: dict[str, Any]) -> bool:
    """Whether a node of `ray.nodes()` carries the label."""
    return machine["Labels"].get(LABEL) == TRAINING
