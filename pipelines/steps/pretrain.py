"""pretrain: modality-aware continual pre-training. Attention becomes bidirectional; masked text and masked patches are restored."""

from dataclasses import dataclass
from typing import Any, Literal

from cluster.workers import Worker
from moca_core.spec import BackboneSpec
from moca_core.types import Attention
from pipelines.pictures.reconstructions import draw_development, read_moments
from pipelines.runner.step import Context, Step
from pipelines.training.config import StageConfig
from pipelines.training.row_streams import rows_of, training_over_rows
from pipelines.training.stage import leftovers, train_stage


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(StageConfig):
    """`rows_per_step` packed rows make one optimizer step over all workers. The rest is the paper's section 3.1.

    `shift` predicts a masked token from the hidden state before it (Eq. 1); without it, from its own position as the authors'
    released code does. Ratio and weight of 0 switch a half off: mlm_ratio=0 with mlm_weight=0, or mae_ratio=0 with mae_weight=0;
    steps=0 leaves the whole stage out. `normalise_patches` paints every patch in units of its own contrast; `decoder_layers` are
    copied from the middle of the language tower upwards. The model that comes out declares `attention`: every reader obeys it.
    `objective="next_token"` is a control: ordinary language modelling of the same rows, nothing masked. `data_fraction` trains on
    so much of the rows, drawn by the seed.
    At `reconstructions` moments, from the start to the end, a few held-out rows are restored and drawn (0: never).
    """

    steps: int = 300
    learning_rate: float = 1e-3
    attention: Attention = "bidirectional"
    objective: Literal["denoise", "next_token"] = "denoise"
    data_fraction: float = 1.0
    rows_per_step: int = 2
    mlm_ratio: float = 0.4
    mae_ratio: float = 0.5
    mlm_weight: float = 1.0
    mae_weight: float = 0.5
    shift: bool = True
    normalise_patches: bool = False
    decoder_layers: int = 1
    reconstructions: int = 5

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
        if self.objective == "next_token" and (self.attention != "causal" or not self.shift or self.mae_weight):
            raise ValueError(
                f"objective='next_token' with attention={self.attention}, shift={self.shift}, mae_weight={self.mae_weight}: nothing may "
                "see the token that it predicts, and no patch is masked; set attention=causal, shift=true, mae_ratio=0, mae_weight=0"
            )
        if not 0 < self.data_fraction <= 1:
            raise ValueError(f"data_fraction={self.data_fraction} must be above 0 and at most 1")
        if self.rows_per_step < 1:
            raise ValueError(f"rows_per_step={self.rows_per_step} must be at least 1")
        if self.reconstructions < 0 or self.reconstructions == 1:
            raise ValueError(f"reconstructions={self.reconstructions} must be 0, or 2 and more: the start and the end")
        if self.decoder_layers < 1:
            raise ValueError(f"decoder_layers={self.decoder_layers} must be at least 1")

    @property
    def predicted_share(self) -> float:
        """How many of the text tokens go through the language head."""
        return 1.0 if self.objective == "next_token" else self.mlm_ratio


def pretrain_step(config: PretrainConfig) -> Step:
    unneeded = leftovers(config.snapshots)
    return Step("pretrain", run, config, ("base", "pack"), code_version=4, resumable=True, leftovers=unneeded)


def run(context: Context) -> dict:
    config: PretrainConfig = context.config
    base, packed = context.inputs["base"], context.inputs["pack"]
    context.run.log_dataset("packed", packed.uri, packed.uri.rsplit("/", 1)[-1], "pretrain")
    kept, held_out = rows_of(packed.result["rows"], config)
    if config.validation_fraction and not len(held_out):
        raise ValueError(
            f"pretrain.validation_fraction={config.validation_fraction} of {len(kept)} rows is less than half a step of "
            f"{config.rows_per_step}; raise it, or set 0"
        )
    if len(kept) < config.rows_per_step:
        raise ValueError(
            f"pretrain.data_fraction={config.data_fraction} leaves {len(kept)} rows, and a step takes {config.rows_per_step}; raise it"
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
            "tokenizer": base.path(base.result["tokenizer"]),
            "uri": context.uri,
            "index": packed.path(packed.result["index"]),
            "files": [packed.path(file) for file, _ in packed.result["files"]],
            "rows_per_file": [rows for _, rows in packed.result["files"]],
            "rows_per_group": packed.result["rows_per_group"],
        },
        start_model=base.path(base.result["model"]),
        losses=[*(["mlm"] if config.mlm_weight else []), *(["mae"] if config.mae_weight else []), "total"],
    )
    return result | {"objective": config.objective} | draw_reconstructions(context)


def draw_reconstructions(context: Context) -> dict[str, Any]:
    """All moments in one picture. For the result: {"reconstructions": {"steps", "right", "words"}}, the first guesses that were right."""
    moments = read_moments(context.uri)
    if not any(moment.images or moment.passages for moment in moments):
        return {}
    context.keep("reconstructions.png", draw_development(moments))
    return {
        "reconstructions": {
            "steps": [moment.step for moment in moments],
            "right": [moment.right for moment in moments],
            "words": len(moments[0].guessed),
        }
    }


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
