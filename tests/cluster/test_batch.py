"""Units of a batch job on an embedded Ray: each once, whatever dies. What runs there is nested, so that Ray ships it by value."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import storage
from cluster.batch import Pool, run_units

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def state(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    where = tmp_path if request.param == "local" else request.getfixturevalue("s3")
    return storage.join(str(where), tmp_path.name, "state")


class Units:
    """Units that leave a line for every time they run, and say what `run_units` says."""

    def __init__(self, folder: Path, state: str) -> None:
        self.log, self.state, self.said = folder / "log", state, list[str]()
        self.log.mkdir()

    def run(self, count: int, then: Callable[[int], None] = lambda number: None) -> list[dict]:
        log = str(self.log)

        def unit(number: int) -> dict:
            with open(f"{log}/{number}", "a") as file:
                file.write(f"{os.getpid()}\n")
            then(number)
            return {"number": number, "square": number**2, "nested": [{"größe": None}, 0.1 + 0.2]}

        return run_units(unit, count, state_uri=self.state, say=self.said.append)

    def runs(self) -> Counter[int]:
        return Counter({int(file.name): len(file.read_text().split()) for file in self.log.iterdir()})


def results(count: int) -> list[dict]:
    return [{"number": n, "square": n**2, "nested": [{"größe": None}, 0.1 + 0.2]} for n in range(count)]


def test_every_unit_runs_once_however_often_it_is_asked_for(state: str, tmp_path: Path) -> None:
    units = Units(tmp_path, state)
    assert units.run(0) == []
    assert units.run(5) == results(5)
    assert units.runs() == Counter(range(5)) and units.said == []
    assert units.run(5) == results(5) and units.run(3) == results(3)
    assert units.runs() == Counter(range(5)) and units.said == []


def test_units_run_in_processes_of_their_own_side_by_side(tmp_path: Path) -> None:
    units, folder = Units(tmp_path, str(tmp_path / "state")), str(tmp_path)

    def meet(number: int) -> None:
        Path(folder, f"here-{number}").touch()
        deadline = time.monotonic() + 60
        while not Path(folder, f"here-{1 - number}").exists():
            assert time.monotonic() < deadline, "the other unit never started"
            time.sleep(0.05)

    assert units.run(2, meet) == results(2)
    assert str(os.getpid()) not in "".join(file.read_text() for file in units.log.iterdir())


def test_an_error_is_raised_as_it_is_and_what_is_finished_is_kept(state: str, tmp_path: Path) -> None:
    units, folder = Units(tmp_path, state), str(tmp_path)

    def fail(number: int) -> None:
        deadline = time.monotonic() + 60
        while number == 4 and not all(Path(folder, "log", str(n)).exists() for n in range(4)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        if number == 4:
            time.sleep(1.0)  # the others write their results
            raise ValueError("file.parquet: no column texts; it has text, images")

    with pytest.raises(ValueError) as raised:
        units.run(5, fail)
    assert type(raised.value) is ValueError  # nothing of Ray around it: a user reads this
    assert str(raised.value) == "file.parquet: no column texts; it has text, images"
    before = units.runs()
    assert before[4] == 1  # an error of our own is no reason to try again
    assert units.run(5) == results(5)
    assert units.said[-1].endswith("of 5 units were finished before") and int(units.said[-1].split()[0]) >= 3
    assert units.runs()[4] == 2 and max(units.runs().values()) <= 2
    assert sum(units.runs().values()) <= 5 + 2


def test_a_unit_whose_process_is_killed_runs_again(state: str, tmp_path: Path) -> None:
    units, marker = Units(tmp_path, state), str(tmp_path / "killed")

    def die_once(number: int) -> None:
        if number == 2 and not os.path.exists(marker):
            Path(marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)

    assert units.run(4, die_once) == results(4)
    assert units.runs() == Counter({0: 1, 1: 1, 2: 2, 3: 1})


def test_processes_of_a_pool_make_what_they_keep_once(tmp_path: Path) -> None:
    folder, state = str(tmp_path), str(tmp_path / "state")

    def make():
        with open(f"{folder}/made", "a") as file:
            file.write(f"{os.getpid()}\n")
        seen = []

        def unit(number: int) -> dict:
            if number == 5 and not os.path.exists(f"{folder}/killed"):
                Path(folder, "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            seen.append(number)
            time.sleep(0.1)
            return {"process": os.getpid(), "seen": len(seen)}

        return unit

    pool = Pool(processes=2, cpus=0.5, gpus=0)
    results = run_units(make, 12, state_uri=state, say=print, pool=pool)
    made = Path(folder, "made").read_text().split()
    assert 2 <= len(made) == len(set(made)) <= 3  # the killed one's place is taken
    by_process = {pid: [r["seen"] for r in results if r["process"] == pid] for pid in map(int, made)}
    assert all(sorted(seen) == list(range(1, len(seen) + 1)) for seen in by_process.values())
    assert run_units(make, 12, state_uri=state, say=print, pool=pool) == results


def test_a_pool_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    def make():
        raise ValueError("model/: no config.json there")

    with pytest.raises(ValueError, match=r"^model/: no config.json there$"):
        run_units(make, 3, state_uri=str(tmp_path), say=print, pool=Pool(1, cpus=0.5, gpus=0))
    with pytest.raises(ValueError, match=r"no room for 1 worker\(s\) with 0.5 CPU and 1 GPU"):
        run_units(make, 3, state_uri=str(tmp_path), say=print, pool=Pool(1, cpus=0.5, gpus=1))


DRIVER = """
import sys, time
from pathlib import Path
from cluster.batch import Pool, run_units
from cluster.session import ClusterConfig, connect

folder, state, count, slow = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])

def unit(number):
    with open(f"{folder}/log/{number}", "a") as file:
        file.write("1\\n")
    time.sleep(slow)
    with open(f"{folder}/done/{number}", "a") as file:
        file.write("1\\n")
    return {"number": number}

connect(ClusterConfig())
print("said", run_units(unit, count, state_uri=state, say=print))
"""


@pytest.mark.slow
def test_a_driver_that_is_killed_repeats_only_what_was_in_flight(tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    for name in ("log", "done"):
        (tmp_path / name).mkdir()
    command = [sys.executable, "-c", DRIVER, str(tmp_path), state, "24"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen([*command, "0.3"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 90
    while len(os.listdir(tmp_path / "done")) < 6:
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    first.kill()
    first.wait()
    finished = len([name for name, _ in storage.list_files(storage.join(state, "results"))])
    again = subprocess.run([*command, "0"], env=environment, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"said {[{'number': n} for n in range(24)]}" in again.stdout
    assert "of 24 units were finished before" in again.stdout and finished > 0
    runs = Counter({int(file.name): len(file.read_text().split()) for file in (tmp_path / "log").iterdir()})
    assert set(runs) == set(range(24)) and max(runs.values()) <= 2
    assert sum(runs.values()) - 24 <= 24 - finished + 1 and sum(runs.values()) - 24 <= 8  # four at a time


def test_a_result_that_is_gone_while_the_checkpoint_has_its_unit_is_made_again(state: str, tmp_path: Path) -> None:
    """A worker that dies while it renames its mark (two requests on S3) leaves both names; Ray then removes its result."""
    units = Units(tmp_path, state)
    assert units.run(3) == results(3)
    folder = storage.join(state, "checkpoint")
    name = storage.list_files(folder)[0][0]
    pending = storage.join(folder, name.replace(".parquet", ".pending.parquet"))
    storage.write_atomic(pending, storage.read_bytes(storage.join(folder, name)))
    assert units.run(5) == results(5)  # more of them: the new ones, and the lost one
    assert sorted(units.runs().values()) == [1, 1, 1, 1, 2] and units.said[0] == "3 of 5 units were finished before"
    assert units.run(5) == results(5) and sum(units.runs().values()) == 6


@pytest.mark.parametrize("kept_bytes", [0, 100])
def test_a_result_that_was_cut_is_made_again(state: str, tmp_path: Path, kept_bytes: int) -> None:
    units, folder = Units(tmp_path, state), storage.join(state, "results")
    assert units.run(3) == results(3)
    cut = storage.join(folder, storage.list_files(folder)[0][0])
    storage.write_atomic(cut, storage.read_bytes(cut)[:kept_bytes])
    assert units.run(3) == results(3)
    assert sorted(units.runs().values()) == [1, 1, 2] and units.said == ["2 of 3 units were finished before"]
    assert units.run(3) == results(3) and sum(units.runs().values()) == 4


def test_a_result_that_json_cannot_hold_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        run_units(lambda number: {"loss": float("nan")}, 1, state_uri=str(tmp_path), say=print)
