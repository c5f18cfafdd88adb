"""finetune: heterogeneous contrastive fine-tuning. Batches are of one task, every rank's candidates answer every query."""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from cluster.workers import Worker
from moca_core.lora import Lora
from moca_core.objective.contrastive_config import ContrastiveConfig
from moca_core.spec import BackboneSpec
from moca_core.types import Attention
from pipelines.pictures.similarities import similarity_histograms
from pipelines.runner.step import Context, Step
from pipelines.training.config import StageConfig
from pipelines.training.pair_streams import held_out_pairs, training_over_pairs
from pipelines.training.stage import leftovers, train_stage


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(StageConfig):
    """`batch_size` queries over all workers share their right answers, at most `num_positives` of each, and at most `num_negatives` hard
    negatives of each (paper, section 3.2); `loss` says how they are compared.

    `weights` draws tasks by name; without it tasks are drawn by their number of pairs. `exclude` leaves tasks out: names, or
    patterns such as "wiki*" (`*` also matches slashes). With `task_batches` a batch is of one task, without it every pair is drawn
    from all of them. The model that comes out declares `attention`: every reader obeys it. With a `lora.rank` adapters are trained and
    nothing else; the model that comes out has them merged into its weights, and `adapter/` beside it holds them alone.
    """

    steps: int = 400
    learning_rate: float = 1e-3
    attention: Attention = "bidirectional"
    batch_size: int = 32
    num_positives: int = 1
    num_negatives: int = 2
    loss: ContrastiveConfig = ContrastiveConfig()
    max_tokens: int = 512
    weights: dict[str, float] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    task_batches: bool = True
    lora: Lora = Lora()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora.rank and self.freeze:
            raise ValueError(
                f"freeze={list(self.freeze)} with lora.rank={self.lora.rank}: under adapters all of the model is frozen; set freeze=[], "
                "and lora.targets to where adapters go"
            )
        if self.batch_size < 2:
            raise ValueError(
                f"batch_size={self.batch_size} must be at least 2: a query needs another's answer to tell from its own"
            )
        if self.num_negatives < 0:
            raise ValueError(f"num_negatives={self.num_negatives} must be at least 0")
        if self.num_positives < 1:
            raise ValueError(f"num_positives={self.num_positives} must be at least 1")
        if any(weight <= 0 for weight in self.weights.values()):
            raise ValueError(f"weights={self.weights} must be positive; leave a task out to switch it off")
        if both := [name for name in self.weights if self.excludes(name)]:
            raise ValueError(
                f"exclude={list(self.exclude)} matches {', '.join(both)}, which weights names; drop it from one"
            )

    def excludes(self, task: str) -> bool:
        return any(fnmatchcase(task, pattern) for pattern in self.exclude)


def finetune_step(
    config: FinetuneConfig,
    start: Literal["base", "pretrain"],
    pairs: Literal["pairs", "mine"] = "pairs",
    name: Literal["finetune", "warmup"] = "finetune",
) -> Step:
    """The step that trains on from the model of the step `start`, on the pairs of the step `pairs`."""
    needs = tuple(dict.fromkeys(("base", start, pairs)))
    unneeded = leftovers(config.snapshots)
    return Step(name, run, config, needs, code_version=6, resumable=True, leftovers=unneeded)


def run(context: Context) -> dict:
    config: FinetuneConfig = context.config
    base, pairs = context.inputs["base"], context.inputs["mine" if "mine" in context.inputs else "pairs"]
    start = context.inputs.get("pretrain", base)
    train = pairs.result["train"]
    sizes = {name: sum(rows for _, rows in files) for name, files in train.items()}
    kept = {name: len(held_out_pairs(name, size, config)[0]) for name, size in sizes.items()}
    weights = task_weights(config, kept)
    if config.validation_fraction and kept == sizes:
        raise ValueError(
            f"finetune.validation_fraction={config.validation_fraction} of {sizes} pairs is less than half a batch of "
            f"{config.batch_size} for every task; raise it, or set 0"
        )
    context.run.log_dataset("pairs", pairs.uri, pairs.uri.rsplit("/", 1)[-1], "finetune")
    config.loss.task_temperatures(sorted(weights))
    config.loss.widths(BackboneSpec.from_dict(base.result["spec"]).text_hidden)
    kind = "each of one of" if config.task_batches else "each over"
    share = config.batch_size / context.execution.cluster.num_workers
    most = config.batch_size * (config.num_positives + config.num_negatives) - 1
    context.say(
        f"{config.steps} batches of {config.batch_size} queries ({share:g} on every worker), {kind} {len(weights)} tasks; at most {most} "
        "negatives for a query"
    )
    result, state = train_stage(
        context,
        worker_main,
        {
            "spec": base.result["spec"],
            "tokenizer": base.path(base.result["tokenizer"]),
            "weights": weights,
            "files": {name: [pairs.path(file) for file, _ in train[name]] for name in weights},
            "rows_per_file": {name: [rows for _, rows in train[name]] for name in weights},
            "rows_per_group": pairs.result["rows_per_group"],
        },
        start_model=start.path(start.result["model"]),
        losses=["contrastive", "accuracy"],
        lora=config.lora if config.lora.rank else None,
    )
    draw_similarities(context, state["observed"]["pairs"], sorted(weights))
    dims = config.loss.matryoshka_dims
    return result | ({"matryoshka_dims": list(dims)} if dims else {})


def draw_similarities(context: Context, sums: list[list[float]], tasks: list[str]) -> None:
    """How similar queries were to right answers and to negatives at the end of training."""
    import torch

    from moca_core.objective.pair_statistics import histograms

    context.keep("similarities.png", similarity_histograms(histograms(torch.tensor(sums), tasks)))


def task_weights(config: FinetuneConfig, sizes: dict[str, int]) -> dict[str, float]:
    """{task: its weight} of the tasks that are drawn.

    Raises ValueError for weights and exclusions of tasks that do not exist, for excluding all, and for tasks smaller than a batch
    that is to be of one task.
    """
    if unknown := sorted(set(config.weights) - set(sizes)):
        raise ValueError(f"finetune.weights names {', '.join(unknown)}; the tasks are {', '.join(sizes)}")
    if idle := [pattern for pattern in config.exclude if not any(fnmatchcase(name, pattern) for name in sizes)]:
        raise ValueError(f"finetune.exclude={idle} matches no task; the tasks are {', '.join(sizes)}")
    weights = config.weights or {name: float(size) for name, size in sizes.items() if not config.excludes(name)}
    if not weights:
        raise ValueError(
            f"finetune.exclude={list(config.exclude)} leaves none of the tasks {', '.join(sizes)}; keep one"
        )
    small = {name: sizes[name] for name in weights if sizes[name] < config.batch_size}
    if small and config.task_batches:
        raise ValueError(
            f"tasks smaller than finetune.batch_size={config.batch_size}: {small}; lower the batch size, leave them out "
            "(finetune.exclude), or let batches be of all tasks (finetune.task_batches=false)"
        )
    return weights


def worker_main(worker: Worker, job: dict[str, Any]) -> dict:
    """One training worker: the model with its attention, its objective over all ranks, and this rank's stream of pairs."""
    from cluster import collectives
    from moca_core.objective.contrastive import Contrastive, Gather
    from pipelines.training.job import load_model, run_training

    config: FinetuneConfig = job["config"]
    spec = BackboneSpec.from_dict(job["spec"])
    model = load_model(job, config.lora)
    gather = Gather(worker.rank, collectives.all_gather_with_grad, collectives.all_gather)
    objective = Contrastive(model, spec, config.loss, tasks=sorted(job["rows_per_file"]), gather=gather)
    return run_training(worker, job, config, training_over_pairs(worker, job, spec, objective))
