"""What a person sees of training: means over the last steps, as rows for the log and as lines."""

import time
from collections.abc import Callable

import numpy as np

from pipelines.training.loop import StepReport

Explain = Callable[[dict[str, np.ndarray]], dict[str, float]]
"""Observations summed over some steps to named numbers."""

HIDDEN = {
    *("step", "step_s", "tokens", "tokens_seen", "tokens_per_s", "flops", "tflops_per_s", "mfu", "data_wait"),
    *("learning_rate", "grad_norm"),
}


class Progress:
    """Means of metrics over the last `every` steps, what was observed in them, and a line a person can read.

    `tokens_seen` counts those of all steps so far; a run that goes on brings what it had.
    """

    def __init__(
        self,
        label: str,
        steps: int,
        every: int,
        explain: Explain = lambda observed: {},
        tokens_seen: int = 0,
    ) -> None:
        self.label, self.steps, self.every, self.explain = label, steps, every, explain
        self.tokens_seen = tokens_seen
        self.window: list[StepReport] = []
        self.started, self.first_step = time.perf_counter(), None

    def add(self, report: StepReport) -> dict[str, float] | None:
        """The row to log at this step: every `every` steps, and at the first and the last."""
        step = report.step
        if self.first_step is None:
            self.first_step = step
        self.window.append(report)
        self.tokens_seen += round(report.metrics["tokens"])
        if (step + 1) % self.every and step + 1 != self.steps and step != 0:
            return None
        row = {name: sum(r.metrics[name] for r in self.window) / len(self.window) for name in report.metrics}
        observed = {name: sum(r.observed[name] for r in self.window) for name in report.observed}
        seconds = {part: sum(r.seconds[part] for r in self.window) for part in report.seconds}
        whole = sum(seconds.values())
        shares = {f"time/{part}": spent / whole for part, spent in seconds.items()}
        row |= {"tokens_seen": self.tokens_seen, "step_s": whole / len(self.window)}
        self.window.clear()
        return {"step": step, **row, **shares, **self.explain(observed)}

    def line(self, row: dict[str, float]) -> str:
        done = row["step"] + 1
        pace_s = (time.perf_counter() - self.started) / (done - self.first_step)
        losses = "  ".join(
            f"{name} {value:.3f}" for name, value in row.items() if name not in HIDDEN and "/" not in name
        )
        speed = f"MFU {row['mfu']:.0%}" if "mfu" in row else f"{row['tflops_per_s']:.2g} TFLOP/s"
        filled = round(20 * done / self.steps)
        return (
            f"{self.label} [{'#' * filled}{'.' * (20 - filled)}] {done:>{len(str(self.steps))}}/{self.steps}  {losses}  "
            f"lr {row['learning_rate']:.1e}  {row['tokens_per_s']:.0f} tok/s  {speed}  data wait {row['data_wait']:.0%}  "
            f"{(self.steps - done) * pace_s:.0f} s left"
        )
