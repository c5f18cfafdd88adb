"""What every step that is to run needs of the cluster, calculated from the recipe."""

from dataclasses import dataclass, field

from cluster.workers import ClusterConfig
from moca_core.spec import BackboneSpec
from pipelines.memory import WORKING_BYTES, MicroBatch, Sharing, activation_bytes, state_bytes, step_bytes
from pipelines.preflight.model import Model
from pipelines.recipe import Recipe
from pipelines.runner.plan import Planned
from pipelines.training.stream import ADDRESSES_PER_TASK

IMAGE_SHARE = 0.5  # assumed of a row's tokens until `pack` has counted them
EMBEDDING = ("evaluate", "mine")
TRAINING = ("pretrain", "warmup", "finetune")


@dataclass(frozen=True)
class Demand:
    """`workers` (`fewest` will do) with so many CPUs and GPUs each. In bytes, 0 where unknown: `device` of a worker's GPU, or of the
    host's memory on CPUs, with its `parts`; `host` of a worker beside that; `store` of Ray's object store for a worker; `scratch` of
    disk for temporary files on every machine of them."""

    step: str
    workers: int
    fewest: int
    cpus: float
    gpus: float
    device: float = 0.0
    host: float = 0.0
    store: float = 0.0
    scratch: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)


def demands(recipe: Recipe, plan: list[Planned], model: Model | None) -> list[Demand]:
    """Of the steps that are not done. Without a model only workers are counted."""
    names = [planned.step.name for planned in plan if not planned.done]
    found = []
    for name in names:
        if name in TRAINING:
            found.append(_training(name, recipe, plan, model))
        elif name in EMBEDDING:
            found.append(_embedding(name, recipe.cluster))
        else:
            found.append(Demand(name, 1, 1, 1, 0))
    return found


def _embedding(name: str, cluster: ClusterConfig) -> Demand:
    return Demand(name, 1, 1, cluster.cpus_per_worker, min(1, cluster.gpus_per_worker))


def _training(name: str, recipe: Recipe, plan: list[Planned], model: Model | None) -> Demand:
    cluster = recipe.cluster
    fewest = cluster.min_workers or cluster.num_workers
    workers = Demand(name, cluster.num_workers, fewest, cluster.cpus_per_worker, cluster.gpus_per_worker)
    if model is None:
        return workers
    stage = "pretrain" if name == "pretrain" else "finetune"
    settings, weights = getattr(recipe, stage), model.of[stage]
    batch, micro_batches = (_row if stage == "pretrain" else _chunk)(recipe, plan, fewest)
    adds_up = cluster.gradient_exchange == "step" and micro_batches > 1
    offloaded = cluster.offload_optimizer != "none", cluster.offload_parameters != "none"
    sharing = Sharing(cluster.zero_stage, fewest, adds_up, *offloaded)
    state = state_bytes(weights, settings.precision, sharing)
    layers = getattr(settings, "decoder_layers", 1)
    activations = activation_bytes(model.spec, batch, cluster.activation_checkpointing, settings.precision, layers)
    if not model.sees[stage]:
        activations["vision layers"] = 0.0
    device = step_bytes(state, activations, weights, sharing, micro_batches) + (
        WORKING_BYTES if cluster.gpus_per_worker else 0
    )
    element = 2 if settings.precision == "bf16" else 4
    optimizer = 12.0 * weights.trained / fewest if offloaded[0] else 0.0
    return Demand(
        **{key: getattr(workers, key) for key in ("step", "workers", "fewest", "cpus", "gpus")},
        device=device,
        host=(4.0 * weights.total if cluster.gpus_per_worker else 0.0)
        + optimizer,  # read as fp32 before it is converted
        store=(cluster.data_tasks_per_worker + 1) * ADDRESSES_PER_TASK * _row_bytes(model.spec, batch),
        scratch=(element + 12.0) * weights.trained + 4.0 * weights.total,  # a checkpoint, and the model it starts from
        parts=state | activations,
    )


def _row(recipe: Recipe, plan: list[Planned], workers: int) -> tuple[MicroBatch, int]:
    """Of pre-training: a packed row at a time."""
    packed = next((p.done for p in plan if p.step.name == "pack" and p.done), None)
    share = packed.result["image_tokens"] / packed.result["tokens"] if packed else IMAGE_SHARE
    tokens, pretrain = recipe.pack.budget_tokens, recipe.pretrain
    words = (1 - share) * tokens * pretrain.predicted_share
    batch = MicroBatch(tokens, share * tokens, words, share * tokens * pretrain.mae_ratio)
    return batch, -(-pretrain.rows_per_step // workers)


def _chunk(recipe: Recipe, plan: list[Planned], workers: int) -> tuple[MicroBatch, int]:
    """Of fine-tuning: what GradCache embeds at a time, or else a worker's share of the batch at its longest."""
    finetune = recipe.finetune
    sequences = -(-finetune.batch_size // workers) * (1 + finetune.num_positives + finetune.num_negatives)
    longest = float(sequences * finetune.max_tokens)
    tokens = min(longest, recipe.cluster.tokens_per_forward or longest)
    return MicroBatch(tokens, IMAGE_SHARE * tokens), 2 if tokens < longest else 1


def _row_bytes(spec: BackboneSpec, batch: MicroBatch) -> float:
    """As the stream carries it: pixels as bytes, and about eight numbers a token."""
    return batch.image_tokens * spec.group_size * spec.patch_values + 64 * batch.tokens
