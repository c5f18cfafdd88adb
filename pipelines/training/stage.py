"""What both training stages do around their workers: start them, turn the last checkpoint into a model folder, draw the losses."""

import tempfile
from collections.abc import Callable
from typing import Any, Literal

from cluster import storage
from cluster.workers import Worker, run_tasks, run_workers
from moca_core.lora import Lora
from moca_core.types import Attention
from pipelines.plots import loss_curves
from pipelines.runner.step import Context

CHECKPOINTS = "checkpoints"


def train_stage(
    context: Context,
    worker_main: Callable[[Worker, dict[str, Any]], dict],
    job: dict[str, Any],
    *,
    start_model: str,
    micro_batches: int,
    losses: list[str],
    lora: Lora | None = None,
) -> dict:
    """Trains on Ray Train workers and writes `model/` below the step's folder. `job` is what the stage's own worker reads.

    Result: {"model", "steps", "attention", "restarts", "first", "last"} with the first and the last logged losses, and "adapter"
    where the worker trains adapters (`lora`).
    """
    execution = context.execution
    job = job | {
        "label": context.step,
        "config": context.config,
        "model": start_model,
        "micro_batches": micro_batches,
        "zero": execution.cluster.shared(),
        "recompute": execution.cluster.activation_checkpointing,
        "compile": execution.cluster.compile_layers,
        "data_tasks": execution.cluster.data_tasks_per_worker,
        "log_every": execution.log_every_steps,
        "checkpoint_every": execution.checkpoint_every_steps,
        "tracking": (context.tracking_uri, context.run.run_id),
    }
    outcome = run_workers(
        worker_main, job, cluster=execution.cluster, storage_uri=context.path(CHECKPOINTS), name=context.fingerprint
    )
    context.say("writing the model")
    written = (outcome.checkpoint_uri, start_model, context.config.attention, lora, context.uri)
    (paths,) = run_tasks(write_model, [written], cpus=1, gpus=0)
    history = outcome.value["history"]
    draw_losses(context, history, losses)
    storage.delete(context.path(CHECKPOINTS))
    return {
        **paths,
        "steps": context.config.steps,
        "attention": context.config.attention,
        "restarts": outcome.restarts,
        "first": {name: history[0][name] for name in losses},
        "last": {name: history[-1][name] for name in losses},
    }


def write_model(
    checkpoint_uri: str, start_model: str, attention: Attention, lora: Lora | None, step_uri: str
) -> dict[Literal["model", "adapter"], str]:
    """ZeRO shards to a Hugging Face folder: the trained weights and the attention they were trained with, declared in its config.

    Everything else is from the folder that training started from. Trained adapters are added to its weights, and written as
    they are too. Returns the folders below `step_uri`.
    """
    from cluster.checkpoint import consolidate
    from moca_core.attention import set_attention
    from moca_core.backbone import load_backbone, save_backbone, trained_weights
    from moca_core.folder import copy_processor
    from moca_core.lora import merge_adapters

    start = storage.localize(start_model)
    weights = trained_weights(consolidate(storage.localize(checkpoint_uri)))
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
        storage.upload(folder, step_uri)
    return {"model": "model"} | ({"adapter": "adapter"} if lora is not None else {})


def draw_losses(context: Context, history: list[dict[str, float]], losses: list[str]) -> None:
    uri = context.path("losses.png")
    storage.write_atomic(uri, loss_curves(context.step, history, losses))
    context.run.log_artifact(storage.localize(uri))
