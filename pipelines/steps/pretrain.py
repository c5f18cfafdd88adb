"""pretrain: modality-aware continual pre-training. Attention becomes bidirectional; masked text and masked patches are restored."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.workers import Worker
from moca_core.data.codec import to_bytes
from moca_core.data.masking import blank, mask
from moca_core.spec import BackboneSpec
from moca_core.types import Attention
from pipelines.runner.step import Context, Step
from pipelines.tables import read_rows, read_table
from pipelines.training.config import StageConfig
from pipelines.training.plan import hold_out, locate, row_plan
from pipelines.training.stage import train_stage
from pipelines.training.stream import open_stream

if TYPE_CHECKING:
    from pipelines.training.job import Stream, Training
    from pipelines.training.loop import Objective


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(StageConfig):
    """`rows_per_step` packed rows make one optimizer step over all workers. The rest is the paper's section 3.1.

    `shift` predicts a masked token from the hidden state before it (Eq. 1); without it, from its own position as the authors'
    released code does. Ratio and weight of 0 switch a half off: mlm_ratio=0 with mlm_weight=0, or mae_ratio=0 with mae_weight=0;
    steps=0 leaves the whole stage out. `normalise_patches` paints every patch in units of its own contrast; `decoder_layers` are
    copied from the middle of the language tower upwards. The model that comes out declares `attention`: every reader obeys it.
    """

    steps: int = 300
    learning_rate: float = 1e-3
    attention: Attention = "bidirectional"
    rows_per_step: int = 2
    mlm_ratio: float = 0.4
    mae_ratio: float = 0.5
    mlm_weight: float = 1.0
    mae_weight: float = 0.5
    shift: bool = True
    normalise_patches: bool = False
    decoder_layers: int = 1

    least_steps = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for part in ("mlm", "mae"):
            ratio, weight = getattr(self, f"{part}_ratio"), getattr(self, f"{part}_weight")
            if not 0 <= ratio < 1:
                raise ValueError(f"{part}_ratio={ratio} must be at least 0 and below 1")
            if weight < 0:
                raise ValueError(f"{part}_weight={weight} must be at least 0")
            if (ratio == 0) != (weight == 0):
                raise ValueError(
                    f"{part}_ratio={ratio} with {part}_weight={weight}: both are 0 (no {part.upper()}) or neither is"
                )
        if self.mlm_ratio == 0 and self.mae_ratio == 0:
            raise ValueError("mlm_ratio=0 and mae_ratio=0 leave nothing to learn; raise one of them")
        if self.rows_per_step < 1:
            raise ValueError(f"rows_per_step={self.rows_per_step} must be at least 1")
        if self.decoder_layers < 1:
            raise ValueError(f"decoder_layers={self.decoder_layers} must be at least 1")


def pretrain_step(config: PretrainConfig) -> Step:
    return Step("pretrain", run, config, needs=("base", "pack"), code_version=2, resumable=True)


def run(context: Context) -> dict:
    config: PretrainConfig = context.config
    base, packed = context.inputs["base"], context.inputs["pack"]
    context.run.log_dataset("packed", packed.uri, packed.uri.rsplit("/", 1)[-1], "pretrain")
    kept, held_out = hold_out(packed.result["rows"], config.validation_fraction, config.rows_per_step, (config.seed,))
    if config.validation_fraction and not len(held_out):
        raise ValueError(
            f"pretrain.validation_fraction={config.validation_fraction} of {len(kept)} rows is less than half a step of "
            f"{config.rows_per_step}; raise it, or set 0"
        )
    epochs = config.steps * config.rows_per_step / len(kept)
    context.say(
        f"{config.steps} steps of {config.rows_per_step} rows: {epochs:.1f} epochs of {len(kept)} rows, {len(held_out)} held out"
    )
    result, _ = train_stage(
        context,
        worker_main,
        {
            "spec": base.result["spec"],
            "index": packed.path(packed.result["index"]),
            "files": [packed.path(file) for file, _ in packed.result["files"]],
            "rows_per_file": [rows for _, rows in packed.result["files"]],
            "rows_per_group": packed.result["rows_per_group"],
        },
        start_model=base.path(base.result["model"]),
        losses=[*(["mlm"] if config.mlm_weight else []), *(["mae"] if config.mae_weight else []), "total"],
    )
    return result


def worker_main(worker: Worker, job: dict[str, Any]) -> dict:
    """One training worker: the model with its new attention, its objective, and this rank's stream of masked rows."""
    import torch

    from moca_core.objective.pretraining import MaskedModelling
    from pipelines.training.job import load_model, run_training

    config: PretrainConfig = job["config"]
    spec = BackboneSpec.from_dict(job["spec"])
    model = load_model(job)
    torch.manual_seed(config.seed)  # the MAE projection is new, and equal on all ranks
    objective = MaskedModelling(
        model,
        spec,
        mlm_weight=config.mlm_weight,
        mae_weight=config.mae_weight,
        shift=config.shift,
        normalise_patches=config.normalise_patches,
        decoder_layers=config.decoder_layers,
    )
    return run_training(worker, job, config, training_over_rows(worker, job, spec, objective))


def training_over_rows(worker: Worker, job: dict[str, Any], spec: BackboneSpec, objective: "Objective") -> "Training":
    """This rank's streams of packed rows: those to train on, and those held out."""
    from pipelines.training.job import Training

    config: PretrainConfig = job["config"]
    costs = read_table(job["index"])["cost_flops"].to_numpy()
    assert len(costs) == sum(job["rows_per_file"]), f"{len(costs)} rows in the index, {job['rows_per_file']} in files"
    kept, held_out = hold_out(len(costs), config.validation_fraction, config.rows_per_step, (config.seed,))
    fetch = {name: job[name] for name in ("files", "rows_per_file", "rows_per_group")}
    make = partial(make_batch, config=config, spec=spec, **fetch)

    def addresses(rows: np.ndarray, steps: range) -> list[dict]:
        plan = row_plan(costs[rows], config.rows_per_step, steps, worker.rank, worker.world_size, config.seed)
        return [a | {"row": None if a["row"] is None else int(rows[a["row"]])} for a in plan]

    def stream(rows: np.ndarray, steps: range) -> "Stream":
        return open_stream(addresses(rows, steps), make, tasks=job["cluster"].data_tasks_per_worker)

    return Training(
        objective,
        open_at=partial(stream, kept),
        open_validation=partial(stream, held_out, range(len(held_out) // config.rows_per_step)),
        describe=lambda step: [piece_ids(a, **fetch) for a in addresses(kept, range(step, step + 1))],
    )


def make_batch(
    address: dict,
    *,
    config: PretrainConfig,
    spec: BackboneSpec,
    files: list[str],
    rows_per_file: list[int],
    rows_per_group: int,
) -> bytes:
    """The masked micro-batch at an address: in the data workers, ahead of training."""
    if address["row"] is None:
        return to_bytes(blank(spec))
    file, row = locate(address["row"], rows_per_file)
    (packed,) = read_rows(files[file], [row], rows_per_group)
    epoch = address["epoch"]
    ratios = {"mlm_ratio": config.mlm_ratio, "mae_ratio": config.mae_ratio}
    return to_bytes(mask(packed, spec, seed=config.seed, epoch=epoch, **ratios))


def piece_ids(address: dict, *, files: list[str], rows_per_file: list[int], rows_per_group: int) -> list[str]:
    """What the row at an address is made of: documents by their id, and which piece of them."""
    if address["row"] is None:
        return []
    file, row = locate(address["row"], rows_per_file)
    return read_rows(files[file], [row], rows_per_group)[0]["piece_ids"]
