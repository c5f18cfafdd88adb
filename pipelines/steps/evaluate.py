"""evaluate: the held-out tasks, by the model before training, after each stage, and by chance; the last stage tested against the first."""

import json
from dataclasses import asdict, dataclass, replace

from cluster.batch import Pool
from moca_core.benchmarks import PROMPTS
from pipelines.evaluation import report
from pipelines.evaluation.engine import evaluate, open_models
from pipelines.evaluation.tasks import StoredTask
from pipelines.pictures.scores import score_dots
from pipelines.reporting.gallery import keep_galleries
from pipelines.runner.step import Context, Step

MODELS = ("base", "pretrain", "finetune", "average")


@dataclass(frozen=True)
class EvaluateConfig:
    """`max_tokens` is the longest query or candidate; `models` are the stages compared ("base" is the model before training).

    Without `models` all stages are that the recipe has; they stand in the order of training. Every model is read with the
    attention that its folder declares. `prompts` are one of the sets of moca_core/benchmarks; without it a task of a public benchmark is
    asked with that benchmark's, any other with none.
    """

    max_tokens: int = 512
    models: tuple[str, ...] | None = None
    prompts: str | None = None

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.models or ()) - set(MODELS)):
            raise ValueError(f"evaluate.models: {', '.join(unknown)} unknown; use some of {', '.join(MODELS)}")
        if self.prompts is not None and self.prompts not in PROMPTS:
            raise ValueError(f"evaluate.prompts={self.prompts!r} unknown; use one of {', '.join(PROMPTS)}")


def evaluate_step(config: EvaluateConfig, stages: tuple[str, ...]) -> Step:
    """`stages` are those that the recipe has, from the first to the last."""
    config = replace(config, models=tuple(name for name in MODELS if name in (config.models or stages)))
    # Another evaluation of this pipeline is one of other models: it would not find these.
    return Step("evaluate", run, config, ("pairs", *config.models), 5, resumable=True, leftovers=("vectors",))


def run(context: Context) -> dict:
    """Result: {"scores": {task: {"chance", model: precision@1}}, "ndcg_at_5": {task: {model: nDCG@5}}, "queries": {task: count},
    "attention": {model: "causal" or "bidirectional"}, "rankings": {model: {task: path}}, "tasks": {task: path below pairs},
    "intervals": {task: {model: {"mean", "low", "high"} of precision@1}}, "comparison": {task, "all": {"difference", "p_value"}}}.

    `comparison` is of the last stage against the first; empty where one stage is scored.
    """
    config: EvaluateConfig = context.config
    pairs = context.inputs["pairs"]
    context.run.log_dataset("tasks", pairs.uri, pairs.uri.rsplit("/", 1)[-1], "evaluate")
    prompts = PROMPTS[config.prompts] if config.prompts else None
    stored = pairs.result["tasks"]
    tasks = [StoredTask.of(name, pairs.path(task["path"]), prompts) for name, task in stored.items()]
    models = {name: context.inputs[name].path(context.inputs[name].result["model"]) for name in config.models}
    cluster = context.execution.cluster
    pool = Pool(cluster.num_workers, cluster.cpus_per_worker, min(1, cluster.gpus_per_worker))
    readers, vectors_uri = open_models(models, config.max_tokens, pool), context.path("vectors")
    evaluated = evaluate(readers, tasks, uri=context.uri, vectors_uri=vectors_uri, pool=pool, say=context.say)
    values = report.read_values(evaluated, context.uri)
    ours, theirs = config.models[-1], config.models[0]
    compared = report.comparisons(values, evaluated.tasks, ours, theirs) if ours != theirs else {}
    document = report.document(values, evaluated, compared, (ours, theirs))
    scores = table_of(document, "precision_at_1", with_chance=True)
    ndcg_at_5 = table_of(document, "ndcg_at_5")
    for metric, by_task in (("precision_at_1", scores), ("ndcg_at_5", ndcg_at_5)):
        for name, row in by_task.items():
            context.run.log_metrics({f"{metric}/{name}/{model}": value for model, value in row.items()})
    for line in score_table(scores).splitlines():
        context.say(line)
    intervals = {
        name: {model: by_metric["precision_at_1"] for model, by_metric in task["scores"].items()}
        for name, task in document["tasks"].items()
    }
    files = {
        "scores.md": score_table(scores).encode(),
        "scores.png": score_dots(scores, intervals),
        "report.md": report.markdown(document).encode(),
        "scores.json": json.dumps(document, indent=2, allow_nan=False).encode(),
        "scores.csv": report.scores_csv(document),
    }
    for name, content in files.items():
        context.keep(name, content)
    keep_galleries(context, {task.name: task.uri for task in tasks}, evaluated.rankings)
    return {
        "scores": scores,
        "ndcg_at_5": ndcg_at_5,
        "queries": {name: task["queries"] for name, task in stored.items()},
        "attention": {reader.label: reader.attention for reader in evaluated.readers},
        "rankings": evaluated.rankings,
        "tasks": {name: task["path"] for name, task in stored.items()},
        "intervals": intervals,
        "comparison": {name: asdict(comparison) for name, comparison in compared.items()},
    }


def table_of(document: dict, metric: str, with_chance: bool = False) -> dict[str, dict[str, float]]:
    """{task: {model: its mean}} by one metric."""
    return {
        name: ({"chance": task["chance"]} if with_chance else {})
        | {model: by_metric[metric]["mean"] for model, by_metric in task["scores"].items()}
        for name, task in document["tasks"].items()
    }


def score_table(scores: dict[str, dict[str, float]]) -> str:
    """Markdown table of precision@1, one row per task."""
    columns = list(next(iter(scores.values())))
    return report.table(
        ["task", *columns], [[name, *(f"{row[c]:.1%}" for c in columns)] for name, row in scores.items()]
    )
