"""What the machines of a cluster have: what Ray hands out of them, and what it does not know, the memory of GPUs and free disk."""

import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

from cluster.placement import is_for_training
from cluster.session import on_a_cluster


@dataclass(frozen=True)
class Machine:
    """`training`: it carries the label. `memory_bytes` is what Ray hands out beside its object store; `scratch_bytes` what is free
    where temporary files lie. `gpu_bytes` is 0 where nobody knows."""

    address: str
    cpus: float
    gpus: float
    training: bool
    memory_bytes: float
    object_store_bytes: float
    scratch_bytes: float
    gpu_name: str = ""
    gpu_bytes: float = 0.0

    @property
    def resources(self) -> dict[str, float]:
        return {"CPU": self.cpus, "GPU": self.gpus}


def machines() -> list[Machine]:
    """All that are alive and have CPUs. Needs `connect` first; every machine is asked by a task of its own."""
    import ray

    nodes = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")]
    if not on_a_cluster():
        return [_machine(node, look(node["Resources"].get("GPU", 0) > 0)) for node in nodes]
    asking = ray.remote(num_cpus=0, max_retries=3)(look)
    answers = [
        asking.options(label_selector={"ray.io/node-id": node["NodeID"]}).remote(node["Resources"].get("GPU", 0) > 0)
        for node in nodes
    ]
    found = []
    for node, answer in zip(nodes, answers, strict=True):
        try:
            found.append(_machine(node, ray.get(answer, timeout=60)))
        except (ray.exceptions.GetTimeoutError, ray.exceptions.RayError):
            continue  # it went away meanwhile
    return found


def most_of_autoscaler() -> dict[str, float] | None:
    """Resources of the cluster when it has grown as far as it may; None where it does not grow."""
    from ray._private.state import state  # Ray Train asks the same there; there is no public way

    return state.get_max_resources_from_cluster_config()


def look(has_gpus: bool) -> dict[str, Any]:
    """Of the machine that this runs on."""
    seen: dict[str, Any] = {"scratch_bytes": shutil.disk_usage(tempfile.gettempdir()).free}
    if has_gpus:
        name, mebibytes = _smallest_gpu()
        seen |= {"gpu_name": name, "gpu_bytes": mebibytes * 2**20}
    return seen


def _smallest_gpu() -> tuple[str, float]:
    """(name, MiB) by the driver's own tool; nothing is known where it is absent."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()
        found = [(line.rpartition(",")[0].strip(), float(line.rpartition(",")[2])) for line in lines]
    except (OSError, subprocess.SubprocessError, ValueError):
        return "", 0.0
    return min(found, key=lambda gpu: gpu[1], default=("", 0.0))


def _machine(node: dict[str, Any], seen: dict[str, Any]) -> Machine:
    resources = node["Resources"]
    return Machine(
        address=node["NodeManagerAddress"],
        cpus=resources.get("CPU", 0),
        gpus=resources.get("GPU", 0),
        training=is_for_training(node),
        memory_bytes=resources.get("memory", 0),
        object_store_bytes=resources.get("object_store_memory", 0),
        **seen,
    )
