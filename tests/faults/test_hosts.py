"""Two machines with names, networks and processes of their own (benchmarks/hosts.py) train together. Needs root."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PROGRAM = """
import socket, sys
import torch, torch.distributed as dist
from cluster.workers import ClusterConfig, run_workers

def worker(worker, config):
    mine = torch.ones(3) * (worker.rank + 1)
    dist.all_reduce(mine)
    hosts = [None] * worker.world_size
    dist.all_gather_object(hosts, socket.gethostname())
    return mine.tolist(), sorted(hosts)

cluster = ClusterConfig(num_workers=2, cpus_per_worker=2)
print(run_workers(worker, {}, cluster=cluster, storage_uri=sys.argv[1], name="run").value)
"""
HOSTS = sys.platform == "linux" and not os.geteuid() and all(map(shutil.which, ("ip", "unshare", "nsenter", "setpriv")))
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not HOSTS, reason="hosts are Linux namespaces, made by root")]


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    from hosts import Network

    shutil.copytree(REPOSITORY / "cluster", tmp_path / "shared" / "cluster")
    network = Network(tmp_path / "hosts", tmp_path / "shared")
    yield network
    network.close()


def test_workers_on_two_machines_that_call_themselves_127_0_1_1(network) -> None:
    one, other = network.add("one"), network.add("other")
    ray = ["ray", "start", "--num-cpus", "2", "--object-store-memory", "100000000"]
    one.run(*ray, "--head", "--include-dashboard", "false", "--node-ip-address", one.address)
    other.run(*ray, "--address", f"{one.address}:6379", "--node-ip-address", other.address)
    joined = {"RAY_ADDRESS": f"{one.address}:6379", "PYTHONPATH": "/mnt"}
    found = one.run("python", "-c", PROGRAM, "/mnt/runs", within_s=200, **joined)
    assert found.splitlines()[-1] == "([3.0, 3.0, 3.0], ['one', 'other'])", found
