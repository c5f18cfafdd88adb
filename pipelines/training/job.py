"""One training stage on one worker: its model, its engine, and the loop over its streams."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from cluster import storage
from cluster.workers import ClusterConfig, Worker
from moca_core.attention import set_attention
from moca_core.backbone import load_backbone
from moca_core.compiled import compile_layers
from moca_core.lora import Lora, add_adapters
from moca_core.parts import freeze
from moca_core.recompute import set_recompute
from moca_core.types import MaskedBatch, PairBatch
from pipelines.training.after_step import StageRun
from pipelines.training.backward import BackwardPass, whole_batches
from pipelines.training.config import StageConfig
from pipelines.training.loop import Objective, train
from pipelines.training.progress import Explain

if TYPE_CHECKING:
    from cluster.engine import Engine, EngineConfig
    from cluster.tracking import Run

Stream = Iterator[tuple[int, list[MaskedBatch | PairBatch]]]


@dataclass(frozen=True)
class Training:
    """What a stage brings: its objective and this rank's streams.

    `open_at(steps)` streams those global steps, `open_validation` what is held out. `describe(step)` names what each
    of this rank's micro-batches of a step was made of. `explain` turns what the objective observed into numbers. `watch(steps done,
    engine, log)` looks at the model before the first step and after each; it changes nothing.
    """

    objective: Objective
    open_at: Callable[[range], Stream]
    open_validation: Callable[[], Stream]
    describe: Callable[[int], list[list[str]]]
    explain: Explain = lambda observed: {}
    backward_pass: BackwardPass = whole_batches
    watch: Callable[[int, "Engine", "Run | None"], None] = lambda done, engine, log: None


def load_model(job: dict[str, Any], lora: Lora | None = None) -> PreTrainedModel:
    """The model that the stage starts from, with its attention, frozen parts and adapters, and what its layers keep or compile.

    `job` holds model (its folder's URI), config and cluster.
    """
    config, cluster = job["config"], job["cluster"]
    model = load_backbone(storage.localize(job["model"]))
    set_attention(model, config.attention)
    freeze(model, config.freeze)
    if lora is not None and lora.rank:
        add_adapters(model, lora, config.seed)
    set_recompute(model, cluster.activation_checkpointing)
    if cluster.compile_layers:
        compile_layers(model)
    return model


def run_training(worker: Worker, job: dict[str, Any], config: StageConfig, training: Training) -> dict[str, Any]:
    """Trains from the newest checkpoint, or from the start, to the last step; returns the state of `StageRun`.

    `job` holds what every stage passes: label, cluster, log_every, checkpoint_every, snapshots (a URI to write them to), tracking (uri
    and run id).
    """
    from cluster import collectives, tracking
    from cluster.communication import communicated_s
    from cluster.devices import peak_flops_per_s
    from cluster.engine import open_engine

    engine = open_engine(training.objective, engine_config(config, job["cluster"]))
    with worker.restore() as directory:
        state = engine.load(directory) if directory is not None else None
    log = tracking.attach(*job["tracking"]) if worker.rank == 0 else None
    run = StageRun(worker, engine, config, training, job, log, state)
    if state is None:
        training.watch(0, engine, log)
    train(
        engine,
        training.objective,
        training.open_at(range(run.state["step"], config.steps)),
        config,
        sum_over_ranks=collectives.all_reduce_sum,
        after_step=run.after_step,
        backward_pass=training.backward_pass,
        notice=worker.preempted,
        peak_flops_per_s=peak_flops_per_s(engine.device, config.precision),
        communicated_s=communicated_s,
    )
    run.flush()
    engine.close()
    return run.state


def engine_config(config: StageConfig, cluster: ClusterConfig) -> "EngineConfig":
    from cluster.engine import EngineConfig

    return EngineConfig(
        precision=config.precision,
        **cluster.shared(),
        max_grad_norm=config.max_grad_norm,
        weight_decay=config.weight_decay,
    )
