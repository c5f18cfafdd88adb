"""A training that counts, to be killed: `python -m tests.faults.counting SETTINGS` with a JSON file of settings.

Every step adds the same rows whatever the number of workers, so a step that was lost or done twice shows in the total. The log
names every step, and by how many workers. It is slow, to be watched, until the file `hurry` is there.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from cluster import ledger
from cluster.workers import ClusterConfig, Worker, run_workers

REPOSITORY = Path(__file__).parents[2]
PATIENCE_S = 400


def count(worker: Worker, config: dict[str, Any]) -> dict[str, Any]:
    """Saves every `every` steps, and once when there is a notice of preemption."""
    import torch
    import torch.distributed as dist

    start, total, noticed = 0, 0, False
    with worker.restore() as folder:
        if folder:
            start, total = json.loads(Path(folder, "state.json").read_text())
    for step in range(start, config["steps"]):
        rows = range(10 * step + worker.rank, 10 * step + 10, worker.world_size)
        added = torch.tensor([sum(rows), worker.preempted()])
        dist.all_reduce(added)
        total += int(added[0])
        if worker.rank == 0:
            with open(config["log"], "a") as log:
                print(step, worker.world_size, bool(added[1]), file=log, flush=True)
        if (step + 1) % config["every"] == 0 or (added[1] and not noticed) or step + 1 == config["steps"]:
            state = json.dumps([step + 1, total])
            worker.save(step + 1, lambda folder, state=state: write(folder, worker.rank, state))
        noticed = bool(added[1])
        if not Path(config["hurry"]).exists():
            time.sleep(config["pace_s"])
    return {"start": start, "total": total, "world_size": worker.world_size}


def write(folder: str, rank: int, state: str) -> None:
    Path(folder, f"rank{rank}").write_text(state)
    if rank == 0:
        Path(folder, "state.json").write_text(state)


def expected(steps: int) -> int:
    return sum(range(10 * steps))


class Step(NamedTuple):
    """One line of the log."""

    number: int
    workers: int
    noticed: bool


class Training:
    """This module as a process. All it leaves lies in `folder`; another one there goes on with the same run."""

    def __init__(self, folder: Path, cluster: dict, environment: dict[str, str], steps: int, pace_s: float) -> None:
        self.folder, self.log, self.result, self.hurry = (
            folder,
            *(folder / name for name in ("log", "result", "hurry")),
        )
        self.log.touch()
        config = {"steps": steps, "every": 5, "pace_s": pace_s, "log": str(self.log), "hurry": str(self.hurry)}
        where = {"storage": str(folder / "storage"), "result": str(self.result)}
        (folder / "settings").write_text(json.dumps({"config": config, "cluster": cluster, **where}))
        command = [sys.executable, "-m", "tests.faults.counting", str(folder / "settings")]
        self.process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, start_new_session=True)

    def steps(self) -> list[Step]:
        """In the order in which they were done."""
        lines = self.log.read_text().split("\n")[:-1]
        return [
            Step(int(number), int(workers), noticed == "True") for number, workers, noticed in map(str.split, lines)
        ]

    def wait_for(self, wanted: Callable[[Step], bool]) -> Step:
        """The first such step from now on."""
        already = len(self.steps())
        return self._wait(lambda: next((step for step in self.steps()[already:] if wanted(step)), None))

    def wait_for_checkpoint(self, step: int) -> None:
        run = str(self.folder / "storage" / "run")
        self._wait(lambda: any(entry.step >= step for entry in ledger.read(run)))

    def finish(self) -> dict[str, Any]:
        self.hurry.touch()
        assert self.process.wait(PATIENCE_S) == 0
        return json.loads(self.result.read_text())

    def end(self) -> None:
        """End what is left of it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, 9)

    def _wait(self, look: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while not (found := look()):
            assert self.process.poll() is None and time.monotonic() < deadline, self.steps()[-20:]
            time.sleep(0.1)
        return found


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    result = run_workers(
        count,
        settings["config"],
        cluster=ClusterConfig(**settings["cluster"]),
        storage_uri=settings["storage"],
        name="run",
    )
    Path(settings["result"]).write_text(json.dumps({**result.value, "restarts": result.restarts}))


if __name__ == "__main__":
    main()
