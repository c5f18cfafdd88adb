"""What both training stages do around their workers: start them, turn the last checkpoint into a model folder, draw the losses."""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster import storage
from cluster.workers import Worker, run_tasks, run_workers
from moca_core.lora import Lora
from moca_core.types import Attention
from pipelines.pictures.losses import loss_curves
from pipelines.pictures.time_spent import shares_of_time, time_spent
from pipelines.runner.step import Context

if TYPE_CHECKING:
    from torch import Tensor

CHECKPOINTS, SNAPSHOTS = "checkpoints", "snapshots"
SNAPSHOT_FILE = "weights.safetensors"


def snapshot_folder(step: int) -> str:
    return storage.join(SNAPSHOTS, f"step_{step:08d}")


def leftovers(snapshots: Sequence[int]) -> tuple[str, ...]:
    """Of a stage's folder: what its models hold when it is finished."""
    return (CHECKPOINTS, *(storage.join(snapshot_folder(step), SNAPSHOT_FILE) for step in snapshots))


def train_stage(
    context: Context,
    worker_main: Callable[[Worker, dict[str, Any]], dict],
    job: dict[str, Any],
    *,
    start_model: str,
    losses: list[str],
    lora: Lora | None = None,
) -> tuple[dict, dict]:
    """Trains on Ray Train workers and writes `model/` below the step's folder. `job` is what the stage's own worker reads.

    Returns (result, last state of the run). The result is {"model", "steps", "attention", "restarts", "consumed", "first", "last",
    "snapshots", "tokens_seen", "flops", "time"} with the first and the last logged losses, "validation" with what is held out, and
    "adapter" where the worker trains adapters (`lora`).
    """
    execution, config = context.execution, context.config
    job = job | {
        "label": context.step,
        "config": config,
        "model": start_model,
        "cluster": execution.cluster,
        "log_every": execution.log_every_steps,
        "checkpoint_every": execution.checkpoint_every_steps,
        "snapshots": context.path(SNAPSHOTS),
        "tracking": (context.tracking_uri, context.run.run_id),
    }
    outcome = run_workers(
        worker_main, job, cluster=execution.cluster, storage_uri=context.path(CHECKPOINTS), name=context.fingerprint
    )
    context.say("writing the model")
    chosen = outcome.best_uri if config.keep == "best" else outcome.checkpoint_uri
    snapshots = [snapshot_folder(step) for step in config.snapshots]
    weights = {context.uri: chosen} | {context.path(folder): context.path(folder) for folder in snapshots}
    writing = [(source, start_model, config.attention, lora, target) for target, source in weights.items()]
    paths = run_tasks(write_model, writing, cpus=1, gpus=0)[0]
    state = outcome.value
    history, validation = state["history"], state["validation"]
    drawn = draw_training(context, history, losses, validation)
    return {
        **paths,
        "snapshots": [storage.join(folder, paths["model"]) for folder in snapshots],
        "steps": config.steps,
        "attention": config.attention,
        "restarts": outcome.restarts,
        "consumed": state["consumed"],
        "first": {name: history[0][name] for name in losses},
        "last": {name: history[-1][name] for name in losses},
        **drawn,
        **({"validation": validation} if validation else {}),
    }, state


def write_model(
    weights_uri: str, start_model: str, attention: Attention, lora: Lora | None, uri: str
) -> dict[Literal["model", "adapter"], str]:
    """Trained weights (a checkpoint, or a snapshot) to a Hugging Face folder, with the attention that they were trained with declared.

    Everything else is from the folder that training started from. Trained adapters are added to its weights, and written as
    they are too. Returns the folders below `uri`.
    """
    from moca_core.attention import set_attention
    from moca_core.backbone import load_backbone, save_backbone, trained_weights
    from moca_core.folder import copy_processor
    from moca_core.lora import merge_adapters

    start = storage.localize(start_model)
    weights = trained_weights(read_weights(storage.localize(weights_uri)))
    model = load_backbone(start)
    with tempfile.TemporaryDirectory() as folder:
        model_folder, adapter_folder = f"{folder}/model", f"{folder}/adapter"
        if lora is not None:
            merge_adapters(model, lora, weights, adapter_folder, start_model)
        else:
            assert weights and weights.keys() <= model.state_dict().keys(), f"{list(weights)[:5]} are not of the model"
            model.load_state_dict(weights, strict=False)  # what was frozen is not in a checkpoint
        set_attention(model, attention)
        save_backbone(model, model_folder)
        copy_processor(start, model_folder)
        storage.upload(folder, uri)
    return {"model": "model"} | ({"adapter": "adapter"} if lora is not None else {})


def read_weights(folder: str) -> "dict[str, Tensor]":
    """What a snapshot or a checkpoint holds of trained weights, fp32, by name."""
    from safetensors.torch import load_file

    from cluster.checkpoint import consolidate

    snapshot = Path(folder, SNAPSHOT_FILE)
    return load_file(snapshot) if snapshot.is_file() else consolidate(folder)


def draw_training(
    context: Context, history: list[dict[str, float]], losses: list[str], validation: Sequence[dict[str, float]] = ()
) -> dict[str, Any]:
    """Keeps the logged rows as history.json, draws losses.png and time.png. For the result: {"tokens_seen", "flops", "time": {part:
    share}}."""
    rows = json.dumps({"history": history, "validation": list(validation)}).encode()
    pictures = {"losses.png": loss_curves(context.step, history, losses, validation)}
    pictures["time.png"] = time_spent(f"where the time of {context.step} went", history)
    for name, data in {"history.json": rows, **pictures}.items():
        context.keep(name, data)
    return {"tokens_seen": history[-1]["tokens_seen"], "flops": flops_of(history), "time": shares_of_time(history)}


def flops_of(history: list[dict[str, float]]) -> float:
    """All FLOPs of training, as the objective counts them. A row is a mean over the steps since the one before."""
    steps = [-1, *(row["step"] for row in history)]
    return sum(row["flops"] * (step - before) for row, before, step in zip(history, steps, steps[1:], strict=False))
