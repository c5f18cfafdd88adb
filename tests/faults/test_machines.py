"""Machines that leave and come back under a training: notice, death, fewer workers, more workers."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.counting import Training, expected
from tests.faults.machines import RAY, Machines

pytestmark = pytest.mark.slow


@pytest.fixture
def machines() -> Iterator[Machines]:
    machines = Machines()
    yield machines
    machines.close()


def drain(machines: Machines, ip: str) -> None:
    """As the operator of spot machines does before it takes one away."""
    program = f"import ray; ray.init(); print(*(n['NodeID'] for n in ray.nodes() if n['NodeManagerAddress'] == '{ip}'))"
    command = [sys.executable, "-c", program]
    asked = subprocess.run(command, env=machines.environment, capture_output=True, text=True, check=True)
    command = [RAY, "drain-node", f"--address={machines.address}", f"--node-id={asked.stdout.split()[-1]}"]
    command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=20"]
    subprocess.run(command, env=machines.environment, check=True)


def test_a_group_shrinks_and_grows_with_its_machines(machines: Machines, tmp_path: Path) -> None:
    for ip in ("127.0.0.2", "127.0.0.3"):
        machines.add(ip)
    cluster = {"cpus_per_worker": 1, "min_workers": 1, "num_workers": 2, "worker_start_timeout_s": 30}
    training = Training(tmp_path, cluster, machines.environment, steps=500, pace_s=0.5)
    training.wait_for(lambda step: step.workers == 2)
    drain(machines, "127.0.0.3")
    noticed = training.wait_for(lambda step: step.noticed)
    training.wait_for_checkpoint(noticed.number + 1)
    machines.kill("127.0.0.3")
    fewer = training.wait_for(lambda step: step.workers == 1)
    assert fewer.number == noticed.number + 1  # the notice cost nothing
    machines.add("127.0.0.4")
    training.wait_for(lambda step: step.workers == 2)
    machines.kill("127.0.0.2")
    killed = time.monotonic()
    training.wait_for(lambda step: step.workers == 1)
    assert time.monotonic() - killed < 120
    result = training.finish()
    assert result["total"] == expected(500)
    assert result["restarts"] == 3
