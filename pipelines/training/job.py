"""One training stage on one worker: engine, restore, loop, progress, checkpoints. The stage brings objective and stream."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from transformers import PreTrainedModel

from cluster import storage
from cluster.workers import Worker
from moca_core.attention import set_attention
from moca_core.backbone import load_backbone
from moca_core.compiled import compile_layers
from moca_core.lora import Lora, add_adapters
from moca_core.parts import freeze
from moca_core.recompute import set_recompute
from moca_core.types import MaskedBatch, PairBatch
from pipelines.training.config import TrainingConfig
from pipelines.training.loop import Objective, train

Stream = Iterator[tuple[int, list[MaskedBatch | PairBatch]]]


def load_model(job: dict[str, Any], lora: Lora | None = None) -> PreTrainedModel:
    """The model that the stage starts from, with its attention, frozen parts and adapters, and what its layers keep or compile.

    `job` holds model (its folder's URI), config, recompute and compile.
    """
    config = job["config"]
    model = load_backbone(storage.localize(job["model"]))
    set_attention(model, config.attention)
    freeze(model, config.freeze)
    if lora is not None and lora.rank:
        add_adapters(model, lora, config.seed)
    set_recompute(model, job["recompute"])
    if job["compile"]:
        compile_layers(model)
    return model


def run_training(
    worker: Worker,
    job: dict[str, Any],
    config: TrainingConfig,
    objective: Objective,
    open_at: Callable[[range], Stream],
) -> dict[str, Any]:
    """Trains from the newest checkpoint, or from the start, to the last step; returns {"history": [...]} of logged steps.

    `job` holds what every stage passes: label, zero (fields of ZeroConfig), log_every, checkpoint_every, tracking (uri and run id).
    `open_at(steps)` gives this rank's stream over those global steps.
    """
    from cluster import collectives, tracking
    from cluster.devices import peak_flops_per_s
    from cluster.engine import EngineConfig, open_engine

    engine = open_engine(
        objective,
        EngineConfig(
            precision=config.precision,
            **job["zero"],
            max_grad_norm=config.max_grad_norm,
            weight_decay=config.weight_decay,
        ),
    )
    state: dict[str, Any] = {"step": 0, "history": []}
    with worker.restore() as directory:
        if directory is not None:
            state = engine.load(directory)
    run = tracking.attach(*job["tracking"]) if worker.rank == 0 else None
    progress = Progress(job["label"], config.steps, job["log_every"])

    def report(step: int, metrics: dict[str, float]) -> None:
        if (row := progress.add(step, metrics)) is not None:
            state["history"].append(row)
            if run is not None:
                run.log_metrics({k: v for k, v in row.items() if k != "step"}, step=step)
                print(progress.line(row), flush=True)

    def checkpoint(done: int) -> None:
        state["step"] = done
        if done % job["checkpoint_every"] == 0 or done == config.steps:
            if run is not None:
                run.flush()
            worker.save(done, lambda folder: engine.save(folder, state))

    if worker.rank == 0 and state["step"]:
        print(f"{job['label']}: resumed from the checkpoint of step {state['step']}", flush=True)
    steps = range(state["step"], config.steps)
    train(
        engine,
        objective,
        open_at(steps),
        config,
        sum_over_ranks=collectives.all_reduce_sum,
        report=report,
        checkpoint=checkpoint,
        peak_flops_per_s=peak_flops_per_s(engine.device, config.precision),
    )
    if run is not None:
        run.flush()
    engine.close()
    return {"history": state["history"]}


class Progress:
    """Means of metrics over the last `every` steps, and a line a person can read."""

    def __init__(self, label: str, steps: int, every: int) -> None:
        self.label, self.steps, self.every = label, steps, every
        self.window: deque[dict[str, float]] = deque(maxlen=every)
        self.started, self.first_step = time.perf_counter(), None

    def add(self, step: int, metrics: dict[str, float]) -> dict[str, float] | None:
        """The row to log at this step: every `every` steps, and at the first and the last."""
        if self.first_step is None:
            self.first_step = step
        self.window.append(metrics)
        if (step + 1) % self.every and step + 1 != self.steps and step != 0:
            return None
        row = {name: sum(m[name] for m in self.window) / len(self.window) for name in metrics}
        self.window.clear()
        return {"step": step, **row}

    def line(self, row: dict[str, float]) -> str:
        done = row["step"] + 1
        pace_s = (time.perf_counter() - self.started) / (done - self.first_step)
        hidden = {"step", "tokens", "tokens_per_s", "tflops_per_s", "mfu", "data_wait", "learning_rate", "grad_norm"}
        losses = "  ".join(f"{name} {value:.3f}" for name, value in row.items() if name not in hidden)
        speed = f"MFU {row['mfu']:.0%}" if "mfu" in row else f"{row['tflops_per_s']:.2g} TFLOP/s"
        filled = round(20 * done / self.steps)
        return (
            f"{self.label} [{'#' * filled}{'.' * (20 - filled)}] {done:>{len(str(self.steps))}}/{self.steps}  {losses}  "
            f"lr {row['learning_rate']:.1e}  {row['tokens_per_s']:.0f} tok/s  {speed}  data wait {row['data_wait']:.0%}  "
            f"{(self.steps - done) * pace_s:.0f} s left"
        )
