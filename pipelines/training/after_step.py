"""What happens after every step of a stage, on every rank alike: the verdict, the log, validation, snapshots, checkpoints."""

import hashlib
import math
import tempfile
from typing import TYPE_CHECKING, Any

from cluster import storage
from cluster.workers import Worker
from pipelines.training.config import StageConfig
from pipelines.training.guard import Guard
from pipelines.training.loop import StepReport, evaluate
from pipelines.training.progress import Progress
from pipelines.training.stage import SNAPSHOT_FILE

if TYPE_CHECKING:
    from cluster.engine import Engine
    from cluster.tracking import Run
    from pipelines.training.job import Training

NAMED = 20  # documents that an error names of every micro-batch


class StageRun:
    """A stage in training.

    `state` travels in checkpoints: step (steps done), history (logged rows), validation (its rows), consumed (what was trained on),
    guard, observed (sums over the last fifth of the steps), tokens_seen.
    """

    def __init__(
        self,
        worker: Worker,
        engine: "Engine",
        config: StageConfig,
        training: "Training",
        job: dict[str, Any],
        log: "Run | None",
        state: dict[str, Any] | None,
    ) -> None:
        self.worker, self.engine, self.log = worker, engine, log
        self.config, self.training, self.job = config, training, job
        if state is not None:
            self.say(f"resumed from the checkpoint of step {state['step']}")
        consumed = {"rows": 0, "digest": ""}
        start = {"step": 0, "history": [], "validation": [], "consumed": consumed, "observed": {}, "tokens_seen": 0}
        self.state = state or start
        self.saved = self.state["step"]
        self.guard = Guard(config.abort_above, self.state.get("guard"))
        seen = self.state["tokens_seen"]
        self.progress = Progress(job["label"], config.steps, job["log_every"], training.explain, seen)
        self.noticed = False

    def after_step(self, report: StepReport) -> None:
        if problem := self.guard.judge(report.metrics["total"], report.metrics["grad_norm"]):
            raise FloatingPointError(self.verdict(report, problem))
        done = report.step + 1
        self.account(report)
        if (row := self.progress.add(report)) is not None:
            self.state["history"].append(row)
            self.record(row, report.step)
            self.say(self.progress.line(row), bare=True)
        self.state["tokens_seen"] = self.progress.tokens_seen
        score = self.validate(report.step) if self.config.validates_after(done) else None
        self.training.watch(done, self.engine, self.log)
        if done in self.config.snapshots:
            self.snapshot(done)
        self.state |= {"step": done, "guard": self.guard.state}
        rescue = report.notice and not self.noticed
        self.noticed |= report.notice
        if done % self.job["checkpoint_every"] == 0 or done == self.config.steps or score is not None or rescue:
            self.flush()
            self.worker.save(done, lambda folder: self.engine.save(folder, self.state), score=score)
            self.saved = done

    def account(self, report: StepReport) -> None:
        """What was trained on, as a running digest: equal for equal rows in equal steps, on however many ranks, and however often a
        run was interrupted."""
        before = self.state["consumed"]
        digest = hashlib.sha256(f"{before['digest']} {report.step} {report.content}".encode()).hexdigest()
        self.state["consumed"] = {"rows": before["rows"] + report.rows, "digest": digest}
        if report.step >= self.config.steps - max(1, self.config.steps // 5):
            late = self.state["observed"]
            for name, value in report.observed.items():
                late[name] = (value + late[name]).tolist() if name in late else value.tolist()

    def validate(self, step: int) -> float:
        """The total loss of what is held out."""
        from cluster import collectives

        stream = self.training.open_validation()
        losses, observed = evaluate(self.engine, self.training.objective, stream, collectives.all_reduce_sum)
        row = {f"validation/{name}": value for name, value in (losses | self.training.explain(observed)).items()}
        self.state["validation"].append({"step": step, "tokens_seen": self.state["tokens_seen"], **row})
        self.record(row, step)
        parts = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
        self.say(f"validation after {step + 1} steps: {parts}")
        if not math.isfinite(losses["total"]):
            raise FloatingPointError(
                f"{self.job['label']}, step {step}: the loss of what is held out is {losses['total']}"
            )
        return losses["total"]

    def snapshot(self, done: int) -> None:
        """Writes the trained weights, whole, beside the checkpoints."""
        from safetensors.torch import save_file

        weights = self.engine.weights()
        if self.worker.rank == 0:
            with tempfile.TemporaryDirectory(prefix="moca-snapshot-") as folder:
                save_file(weights, f"{folder}/{SNAPSHOT_FILE}")
                storage.upload(folder, storage.join(self.job["snapshots"], f"step_{done:08d}"))

    def verdict(self, report: StepReport, problem: str) -> str:
        """The error that ends the run, the same on all ranks."""
        from cluster import collectives

        batches = self.training.describe(report.step)
        bad = [", ".join(batches[number][:NAMED]) for number in report.bad_micro_batches]
        everything = [", ".join(names[:NAMED]) for names in batches]
        by_rank = collectives.all_gather_objects((bad, everything))
        bad_count, all_count = (sum(len(both[side]) for both in by_rank) for side in (0, 1))
        guilty = 0 < bad_count < all_count  # where all are, the weights were bad before
        named = [f"rank {rank}: {names}" for rank, both in enumerate(by_rank) for names in both[0 if guilty else 1]]
        parts = {name: report.metrics[name] for name in self.training.objective.weights}
        good = f"{self.worker.run_uri}, step {self.saved}" if self.saved else "none yet"
        return (
            f"{self.job['label']}, step {report.step}: {problem}; losses by part {parts}. "
            + ("Not finite by themselves are " if guilty else "No batch is at fault by itself; the step was made of ")
            + "; ".join(named)
            + f". The last good checkpoint: {good}"
        )

    def record(self, row: dict[str, float], step: int) -> None:
        if self.log is not None:
            self.log.log_metrics({name: value for name, value in row.items() if name != "step"}, step=step)

    def say(self, line: str, *, bare: bool = False) -> None:
        if self.worker.rank == 0:
            print(line if bare else f"{self.job['label']}: {line}", flush=True)

    def flush(self) -> None:
        if self.log is not None:
            self.log.flush()
