"""Requests, limits and volumes add up: within a pod, on the nodes that docs/clusters.md asks for, and for the recipe that runs there."""

import re
from dataclasses import dataclass

import pytest

from cluster.machines import Machine
from cluster.placement import LABEL, TRAINING
from pipelines import sizing
from pipelines.memory import Weights
from pipelines.preflight.check import check
from pipelines.preflight.demand import demands
from pipelines.preflight.model import Model
from pipelines.runner.plan import Planned
from pipelines.runner.step import Step
from tests.deploy.manifests import (
    JOBS,
    OVERLAYS,
    REPOSITORY,
    Manifest,
    container,
    groups,
    pods,
    quantity,
    raw,
    ray_job,
    recipe_of,
)
from tests.pipelines.test_sizing import SPEC_3B

GI = 2**30
GPU_BYTES = {"single-gpu": 141e9, "eight-gpus": 80e9, "four-nodes-rdma": 80e9}
STAGES = ("pretrain", "finetune")
WAITING = {"cpu": 0.2, "memory": 256 * 2**20}  # the operator's own container, which waits for the head first


@dataclass(frozen=True)
class Nodes:
    """Of one kind, as a row of the table in docs/clusters.md has them."""

    groups: tuple[str, ...]
    count: int
    cpus: int
    memory_gi: int
    disk_gi: int
    gpus: int

    def free(self) -> dict[str, float]:
        """What is left for pods beside the system: Google's published formula for its nodes, and 1 CPU and 2 GiB for every
        node's own pods (network, GPU driver, logs)."""
        cpu = self.cpus - sum(share * max(0, min(self.cpus, to) - start) for start, to, share in CPU_RESERVED)
        memory = self.memory_gi - sum(s * max(0, min(self.memory_gi, to) - start) for start, to, s in MEMORY_RESERVED)
        return {
            "cpu": cpu - 1,
            "memory": (memory - 2) * GI,
            "ephemeral-storage": 0.9 * self.disk_gi * GI,  # kubelet evicts from 90 % on
            "nvidia.com/gpu": self.gpus,
        }


CPU_RESERVED = ((0, 1, 0.06), (1, 2, 0.01), (2, 4, 0.005), (4, 10**6, 0.0025))
MEMORY_RESERVED = ((0, 4, 0.25), (4, 8, 0.2), (8, 16, 0.1), (16, 128, 0.06), (128, 10**6, 0.02))


def nodes_of(overlay: str) -> list[Nodes]:
    """The rows `| overlay | groups | count | CPUs | memory GiB | disk GiB | GPUs |` of the table."""
    rows = re.findall(rf"^\| `{overlay}` \|(.*)\|$", (REPOSITORY / "docs" / "clusters.md").read_text(), re.MULTILINE)
    cells = [[cell.strip() for cell in row.split("|")] for row in rows]
    return [
        Nodes(tuple(names.split(", ")), *(int(re.sub(r"\D.*", "", c.replace(",", ""))) for c in counts))
        for names, *counts in cells
    ]


def requests_of(template: dict) -> dict[str, float]:
    """Of a pod: its container's, or those of the one that runs before it if they are more."""
    requests = {key: quantity(value) for key, value in container(template)["resources"]["requests"].items()}
    return requests | {key: max(requests[key], value) for key, value in WAITING.items()}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_fit_the_nodes_that_are_asked_for(overlay: str) -> None:
    job = ray_job(overlay)
    of_groups = {name.removeprefix(f"{job['metadata']['name']}-"): pod for name, pod in pods(job).items()}
    of_services = {
        name: pod for manifest in raw() if manifest["kind"] != "RayJob" for name, pod in pods(manifest).items()
    }
    everything = of_groups | of_services
    if overlay != "cpu-trial":
        everything = {name: pod for name, pod in everything.items() if name not in ("store", "bucket")}
    nodes = nodes_of(overlay)
    assert sorted(name for node in nodes for name in node.groups) == sorted(everything)
    for kind in nodes:
        on_node: dict[str, float] = {}
        for name in kind.groups:
            template, count = everything[name]
            assert count in (1, kind.count)
            for key, value in requests_of(template).items():
                on_node[key] = on_node.get(key, 0) + value
        free = kind.free()
        for key, value in on_node.items():
            assert key.startswith("rdma/") or value <= free[key], f"{kind.groups}: {key} {value} of {free[key]}"


@pytest.mark.parametrize("name", JOBS)
def test_a_pod_holds_what_it_mounts(name: str) -> None:
    for pod, (template, _) in pods(ray_job(name)).items():
        main = container(template)
        limits = {key: quantity(value) for key, value in main["resources"]["limits"].items()}
        assert main["resources"]["requests"] == main["resources"]["limits"], pod  # nobody else's work can take it away
        volumes = {volume["name"]: volume["emptyDir"] for volume in template["spec"]["volumes"]}
        shm = quantity(volumes.pop("shm")["sizeLimit"]) if "shm" in volumes else 0
        assert shm <= limits["memory"] / 2, pod  # it counts as the pod's memory
        if "ray" in main["name"] and main["name"] != "ray-job-submitter":
            # Ray's object store takes 30 % of memory, and NCCL or gloo some more
            assert shm > 0.3 * limits["memory"], pod
        assert sum(quantity(volume["sizeLimit"]) for volume in volumes.values()) <= limits["ephemeral-storage"], pod


@pytest.mark.parametrize("name", JOBS)
def test_the_cluster_holds_exactly_the_workers_of_the_recipe(name: str) -> None:
    job = ray_job(name)
    cluster, nodes = recipe_of(job).cluster, groups(job)
    group = nodes["gpu" if cluster.gpus_per_worker else "training"]
    limits = container(group["template"])["resources"]["limits"]
    if cluster.gpus_per_worker:
        assert cluster.gpus_per_worker == 1
        assert group["replicas"] * int(limits["nvidia.com/gpu"]) == cluster.num_workers
    # Beside its workers a node must hold the tasks that prepare their rows, where data nodes are full or there are none: each takes
    # a core beside GPUs; Ray gives it a place for a quarter of one (pipelines/training/stream.py).
    a_task = 1 if cluster.gpus_per_worker else 0.25
    of_one = cluster.cpus_per_worker + a_task * cluster.data_tasks_per_worker
    assert cluster.num_workers / group["replicas"] * of_one <= quantity(limits["cpu"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_preflight_lets_the_job_pass(overlay: str) -> None:
    """On machines as Ray sees the pods: otherwise the nodes would be paid for a run that refuses to start."""
    job = ray_job(overlay)
    recipe = recipe_of(job)
    trained = Weights(*[sizing.weight_count(SPEC_3B, tied=True)] * 2, SPEC_3B.vocab_size * SPEC_3B.text_hidden)
    model = (
        Model(SPEC_3B, dict.fromkeys(STAGES, trained), dict.fromkeys(STAGES, True)) if overlay in GPU_BYTES else None
    )
    plan = [Planned(Step(name, print, None, (), 1), {}, "", "", None, "") for name in ("corpus", *STAGES, "evaluate")]
    findings = check(demands(recipe, plan, model), machines_of(job, GPU_BYTES.get(overlay, 0)), None)
    assert [str(finding) for finding in findings if not finding.met] == []
    assert any(finding.what.startswith("GPU memory") for finding in findings) == (overlay in GPU_BYTES)


def machines_of(job: Manifest, gpu_bytes: float) -> list[Machine]:
    found = []
    for name, group in list(groups(job).items())[1:]:
        limits = container(group["template"])["resources"]["limits"]
        cpus, gpus, memory = (quantity(limits.get(key, 0)) for key in ("cpu", "nvidia.com/gpu", "memory"))
        (scratch,) = (
            v["emptyDir"]["sizeLimit"] for v in group["template"]["spec"]["volumes"] if v["name"] == "scratch"
        )
        trains = group.get("labels") == {LABEL: TRAINING}
        machine = Machine(
            name, cpus, gpus, trains, memory, 0.3 * memory, quantity(scratch), "", gpu_bytes if gpus else 0
        )
        found += [machine] * group["replicas"]
    return found
