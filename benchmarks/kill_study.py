"""Training that is killed and resumed ends with the weights, to the bit, of training that was left alone.

    python benchmarks/kill_study.py --runs 20 --seed 0 [--aimed] [--folder FOLDER]

Every run is `python pipelines/full.py` with a tiny model on two workers, in pre-training or in fine-tuning, with a checkpoint every few
steps. By turns a SIGKILL ends a training worker, the driver (alone, or with all that it started) or a whole Ray node: in one run at a
moment drawn over the time that both stages take undisturbed, in the next at a drawn step. What comes before the stage of the kill is
made once and copied, what comes after follows from its weights and is left out. The driver is started again, the node replaced.
Every other round runs on a cluster of nodes, the others on the Ray inside the driver; nodes are always lost on a cluster.
`--aimed` adds kills before the first checkpoint and during the upload of one, and two kills in one run.

A line per run: what was killed and where, how often workers were started again, how long it took to be past that point, whether the
weights are those of an undisturbed run, and whether the rows that were trained on are, each once. FAIL, and exit code 1, if any
differs, or if the command fails or hangs. With a `--folder` the same command goes on where it was
interrupted, and what the pipeline printed stays there. Linux only. A run takes one to two minutes on two cores.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil
import yaml
from kill_plans import Hit, Plan, Reference, Row, judge, plans, whom
from ray_nodes import CPUS, READABLE, Nodes, kill_marked, marked
from watched_command import CHECKPOINT_EVERY, RECIPE, REPOSITORY, STAGES, STEPS, Command, Failed, Outcome, outcome_of

STUDY, RUN = "MOCA_BENCHMARK_STUDY", "MOCA_BENCHMARK_RUN"  # what their processes are found by
MADE_ONCE = tuple(f"prepared/{step}" for step in ("corpus", "pairs", "clean", "base", "pack"))
HANGS_S = 900


class Study:
    """What all runs share: the folder, the steps that are made once, the nodes, and undisturbed runs to compare with."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.scratch = tempfile.mkdtemp(prefix="kills-", dir="/tmp")  # short: Ray's sockets lie in it
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MOCA_", "MLFLOW_"))}
        self.environment |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", STUDY: self.scratch} | READABLE
        self.environment["RAY_worker_niceness"] = "0"  # 15 by default: beside other work, workers would hardly move
        self.environment |= {"TMPDIR": self.scratch, "MOCA_CACHE": f"{self.scratch}/cache"}
        self.nodes: Nodes | None = None
        self.pace = 1.0  # the machine may have become quicker since the undisturbed runs: the time of a run, in theirs
        self._workers: tuple[float, list[psutil.Process]] = (0.0, [])
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))

    def close(self) -> None:
        kill_marked(STUDY, self.scratch)
        if self.nodes is not None:
            self.nodes.close()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def start(self, name: str, *options: str, clustered: bool, copied: Sequence[str] = ()) -> Command:
        """The command on a root of its own, with copies of steps that are done."""
        if clustered and self.nodes is None:
            self.nodes = Nodes(self.environment, 2)
        environment = (self.nodes.environment if clustered else self.environment) | {RUN: f"{self.scratch}/{name}"}
        root = self.folder / name
        shutil.rmtree(root, ignore_errors=True)
        for step in copied:
            shutil.copytree(self.folder / step, root / Path(step).name)
        if clustered:  # so that a node holds one worker
            options += ("--set", f"cluster.cpus_per_worker={CPUS - 1}")
        arguments = ["--recipe", str(self.folder / "recipe.yaml"), "--root", str(root), *options]
        return Command(arguments, environment, self.folder / f"{name}.log")

    def prepare(self) -> None:
        if not (self.folder / "prepared" / "latest").exists():
            self.start("prepared", "--until", "pack", clustered=False).finish(HANGS_S)

    def undisturbed(self, clustered: bool) -> Reference:
        """What comes of a run that nobody disturbs."""
        name = "undisturbed-nodes" if clustered else "undisturbed"
        kept = self.folder / f"{name}.json"
        if not kept.exists():
            command = self.start(name, "--until", "finetune", clustered=clustered, copied=MADE_ONCE)
            command.finish(HANGS_S)
            found = Reference(name, asdict(outcome_of(self.folder / name, STAGES)), command.stages_s())
            kept.write_text(json.dumps(asdict(found)))
        return Reference(**json.loads(kept.read_text()))

    def disturbed(self, plan: Plan) -> Row:
        """The run of a plan. A moment at which nobody was left to kill is drawn again."""
        kept = self.folder / f"{plan.name}.json"
        if kept.exists():
            return Row(**json.loads(kept.read_text()))
        reference = self.undisturbed(plan.clustered)
        draw = np.random.default_rng([self.seed, *plan.name.encode()])
        while (row := self.attempt(plan, draw, reference)) is None:
            continue
        kept.write_text(json.dumps(asdict(row)))
        if row.good():
            shutil.rmtree(self.folder / plan.name)
        return row

    def attempt(self, plan: Plan, draw: np.random.Generator, reference: Reference) -> Row | None:
        at_s = draw.uniform(0, sum(reference.stages_s))
        stage = {"any time": int(at_s >= reference.stages_s[0]), "any step": int(draw.integers(2))}.get(plan.when, 0)
        at_s = (at_s - sum(reference.stages_s[:stage])) * self.pace
        stages, copied = STAGES[: stage + 1], (*MADE_ONCE, *([f"{reference.name}/pretrain"] if stage else []))
        settings = ["--set", f"tracking.checkpoint_every_steps={STEPS}"] if plan.when == "before a checkpoint" else []
        command = self.start(plan.name, "--until", stages[-1], *settings, clustered=plan.clustered, copied=copied)
        ready = self.moment(plan, command, stage, at_s, draw)
        hits: list[Hit] = []
        try:
            for victim in plan.victims:
                if (hit := self.hit(victim, ready, plan, command, draw)) is None:
                    if plan.when == "any time":
                        self.pace *= min(1.0, command.training_s() / at_s)
                    return None
                hits.append(hit)
                ready = after(draw.uniform(0, 20))
            command.finish(HANGS_S)
            found = outcome_of(self.folder / plan.name, stages)
            return judge(plan, hits, command, found, Outcome(**reference.outcome))
        except Failed as failure:
            return Row(plan.name, whom(hits), "somewhere", at_s, 0, 0.0, str(failure), "unknown")
        finally:
            kill_marked(RUN, f"{self.scratch}/{plan.name}")

    def hit(self, victim: str, ready: Callable[[], bool], plan: Plan, command: Command, draw) -> Hit | None:
        """The kill, as soon as it is time and there is somebody to kill; None if the command ends before."""
        while not command.ended():
            before = time.monotonic(), command.training_s(), command.reached()
            if ready() and (who := self.kill(victim, plan, command, draw)):
                return Hit(who, *before)
            self.workers()  # known beforehand, so that the kill comes at once
            time.sleep(0.002)
        command.finish(0)
        return None

    def moment(self, plan: Plan, command: Command, stage: int, at_s: float, draw) -> Callable[[], bool]:
        """Whether it is time for the first kill."""
        if plan.when == "any step":
            place = (stage, int(draw.integers(1, STEPS)))
            return lambda: command.reached() >= place
        if plan.when == "before a checkpoint":
            return lambda: command.reached() >= (0, 3)
        if plan.when == "in an upload":
            step = CHECKPOINT_EVERY * draw.integers(2, STEPS // CHECKPOINT_EVERY)
            return lambda: any((self.folder / plan.name).glob(f"pretrain/*/checkpoints/*/step_{step:08d}"))
        return lambda: command.training_s() >= at_s

    def kill(self, victim: str, plan: Plan, command: Command, draw: np.random.Generator) -> str:
        """Who was killed, in words; nothing if there was nobody. What was lost is replaced."""
        if victim == "worker":
            workers = self.workers()
            return "worker" if workers and killed(workers[draw.integers(len(workers))]) else ""
        if victim == "node":
            self.nodes.lose(self.nodes.names[draw.integers(len(self.nodes.names))])
            self.nodes.add()
            return "node"
        if command.ended():
            return ""
        alone = plan.clustered or draw.integers(2)  # on a cluster it has started nothing
        command.process.kill() if alone else kill_marked(RUN, f"{self.scratch}/{plan.name}")
        command.process.wait()
        command.start()
        return "driver" if alone else "driver and its Ray"

    def workers(self) -> list[psutil.Process]:
        """The training workers that there were half a second ago at most."""
        if time.monotonic() - self._workers[0] > 0.5:
            ours = marked(STUDY, self.scratch)
            self._workers = time.monotonic(), [process for process in ours if is_worker(process)]
        return self._workers[1]


def killed(process: psutil.Process) -> bool:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return False
    return True


def is_worker(process: psutil.Process) -> bool:
    try:
        return "RayTrainWorker" in " ".join(process.cmdline())
    except psutil.Error:
        return False  # it ended


def after(seconds: float) -> Callable[[], bool]:
    then = time.monotonic() + seconds
    return lambda: time.monotonic() >= then


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="with drawn moments (default: 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--aimed", action="store_true", help="also runs that are killed at chosen moments")
    parser.add_argument(
        "--folder", type=Path, help="where to keep what is done (default: a temporary one, removed when all is well)"
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="kill-study-"))).absolute()
    study = Study(folder, options.seed)
    try:
        good = run_study(study, plans(options.runs, options.aimed))
    finally:
        study.close()
    if good and options.folder is None:
        shutil.rmtree(folder)
    return 0 if good else 1


def run_study(study: Study, todo: list[Plan]) -> bool:
    study.prepare()
    references = [study.undisturbed(clustered) for clustered in sorted({plan.clustered for plan in todo})]
    for found in references:
        print(
            f"{found.name}: {' and '.join(f'{s:.0f} s' for s in found.stages_s)}, {found.outcome['weights']}",
            flush=True,
        )
    same = all(found.outcome == references[0].outcome for found in references)
    good = 0
    for plan in todo:
        row = study.disturbed(plan)
        good += row.good()
        print(row.line(), flush=True)
    print(
        f"{'PASS' if same and good == len(todo) else 'FAIL'}: {good} of {len(todo)} killed runs end as if undisturbed",
        flush=True,
    )
    return same and good == len(todo)


if __name__ == "__main__":
    sys.exit(main())
