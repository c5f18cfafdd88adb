"""What runs on which machine of a Ray cluster: with a label on some, with GPUs (as Ray is told) in some."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.batch import Pool
from cluster.placement import places
from tests.faults.machines import Machines

DATA, TRAINING, GPU = "127.0.0.2", "127.0.0.3", "127.0.0.4"
PROGRAM = """
import json, sys, time
import ray
from cluster.batch import Pool, run_units
from cluster.machines import machines, most_of_autoscaler
from cluster.workers import ClusterConfig, connect, run_tasks, run_workers

folder, kind = sys.argv[1:]

def here(*given):
    time.sleep(0.1)
    return ray.util.get_node_ip_address()

def unit(number):
    return {"ip": here()}

def make():
    return unit

def worker(worker, config):
    return here()

connect(ClusterConfig())
seen = {m.address: [m.cpus, m.gpus, m.training, m.scratch_bytes > 0, m.memory_bytes > 0] for m in machines()}
ips = lambda found: sorted({row["ip"] for row in found})
say = lambda line: None
if kind == "spread":
    found = {
        "machines": seen,
        "autoscaler": most_of_autoscaler(),
        "units": ips(run_units(unit, 4, state_uri=f"{folder}/units", say=say)),
        "tasks": sorted(set(run_tasks(here, [(n,) for n in range(3)], cpus=0.5, gpus=0))),
        "embedding": ips(run_units(make, 4, state_uri=f"{folder}/pool", say=say, pool=Pool(1, 1, 0))),
        "embedding on GPUs": ips(run_units(make, 4, state_uri=f"{folder}/gpus", say=say, pool=Pool(1, 1, 1))),
    }
elif kind == "room":
    try:
        run_workers(worker, {}, cluster=ClusterConfig(num_workers=3, cpus_per_worker=1, worker_start_timeout_s=1),
                    storage_uri=folder, name="run")
    except ValueError as error:
        found = {"error": str(error)}
else:
    cluster = ClusterConfig(num_workers=2, cpus_per_worker=1)
    found = {"workers": run_workers(worker, {}, cluster=cluster, storage_uri=folder, name="run").value,
             "units": ips(run_units(unit, 4, state_uri=f"{folder}/units", say=say))}
open(f"{folder}/found.json", "w").write(json.dumps(found))  # Ray prints beside us
"""


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    """A machine without label, one for training, and one of which Ray believes that it has a GPU."""
    machines = Machines()
    machines.add(DATA, "--num-cpus=4")
    machines.add(TRAINING, "--num-cpus=2", "--labels", "moca.role=training")
    machines.add(GPU, "--num-cpus=4", "--num-gpus=1")
    yield machines
    machines.close()


def found(machines: Machines, folder: Path, kind: str) -> dict:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", PROGRAM, str(folder), kind]
    done = subprocess.run(
        command, env=machines.environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text())


def test_machines_for_training_are_left_to_it(machines: Machines, tmp_path: Path) -> None:
    where = found(machines, tmp_path, "spread")
    assert where.pop("machines") == {
        DATA: [4, 0, False, True, True],
        TRAINING: [2, 0, True, True, True],
        GPU: [4, 1, False, True, True],
    }
    assert where.pop("autoscaler") is None
    assert where == {"units": [DATA], "tasks": [DATA], "embedding": [TRAINING], "embedding on GPUs": [GPU]}


def test_more_workers_than_machines_for_training_hold_are_refused(machines: Machines, tmp_path: Path) -> None:
    error = found(machines, tmp_path, "room")["error"]
    assert error.startswith("no room for 3 worker(s) with 1 CPU and 0 GPU each: ")
    assert "2 of them on 1 machine(s) labelled moca.role=training" in error


@pytest.mark.slow
def test_data_goes_where_there_is_room_when_its_own_machines_are_gone(machines: Machines, tmp_path: Path) -> None:
    assert found(machines, tmp_path / "all", "train") == {"workers": TRAINING, "units": [DATA]}
    machines.kill(DATA)
    machines.kill(GPU)
    assert found(machines, tmp_path / "less", "train") == {"workers": TRAINING, "units": [TRAINING]}


def test_places_of_a_machine() -> None:
    assert places({"CPU": 4.0}, 9, 0.5, 0) == 8
    assert places({"CPU": 4.0, "GPU": 3.0}, 9, 0.5, 1) == 3
    assert places({"GPU": 3.0}, 9, 0.5, 1) == 0
    assert places({"CPU": 0.3}, 9, 0.1, 0) == 3  # 0.3 / 0.1 is a little less
    assert places({}, 9, 0, 0) == 9


@pytest.mark.parametrize(
    ("machines", "asked", "pool"),
    [
        ([{"CPU": 4}], None, Pool(1, 2, 0)),
        ([{"CPU": 4}], 4, Pool(4, 0.5, 0)),  # with a CPU each nothing would be left to what feeds them
        ([{"CPU": 8}] * 4, None, Pool(1, 4, 0)),  # half of what one machine has
        ([{"CPU": 8, "GPU": 8}], None, Pool(8, 0.5, 1)),
        ([{"CPU": 64, "GPU": 4}, {"CPU": 32}], None, Pool(4, 1, 1)),
    ],
)
def test_a_pool_of_all_leaves_half_of_the_cpus(
    monkeypatch: pytest.MonkeyPatch, machines: list[dict], asked: int | None, pool: Pool
) -> None:
    total = {kind: sum(machine.get(kind, 0) for machine in machines) for kind in ("CPU", "GPU")}
    monkeypatch.setattr("ray.cluster_resources", lambda: total)
    monkeypatch.setattr("ray.nodes", lambda: [{"Resources": machine, "Alive": True} for machine in machines])
    assert Pool.of_all(asked) == pool
