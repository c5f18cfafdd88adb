"""evaluate: precision@1 on the held-out tasks, for the model before training, after each stage, and by chance."""

from dataclasses import dataclass, replace

import numpy as np

from cluster import storage
from cluster.workers import run_tasks
from moca_core.data.schema import tables_to_task
from moca_core.metrics import chance_at_1, ndcg, precision_at_1
from moca_core.types import Attention, EvalTask
from pipelines.pictures.scores import score_bars
from pipelines.runner.step import Context, Step
from pipelines.tables import read_table

MODELS = ("base", "pretrain", "finetune", "average")


@dataclass(frozen=True)
class EvaluateConfig:
    """`max_tokens` is the longest query or candidate; `models` are the stages compared ("base" is the model before training).

    Without `models` all stages are that the recipe has. Every model is read with the attention that its folder declares.
    """

    max_tokens: int = 512
    models: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.models is None:
            return
        if unknown := sorted(set(self.models) - set(MODELS)):
            raise ValueError(f"evaluate.models: {', '.join(unknown)} unknown; use some of {', '.join(MODELS)}")


def evaluate_step(config: EvaluateConfig, stages: tuple[str, ...]) -> Step:
    """`stages` are those that the recipe has, from the first to the last."""
    config = config if config.models else replace(config, models=stages)
    return Step("evaluate", run, config, needs=("pairs", *config.models), code_version=2)


def run(context: Context) -> dict:
    """Result: {"scores": {task: {"chance", model: precision@1}}, "ndcg_at_5": {task: {model: nDCG@5}}, "queries": {task: count},
    "attention": {model: "causal" or "bidirectional"}}."""
    config: EvaluateConfig = context.config
    pairs = context.inputs["pairs"]
    context.run.log_dataset("tasks", pairs.uri, pairs.uri.rsplit("/", 1)[-1], "evaluate")
    tasks = {name: pairs.path(task["path"]) for name, task in pairs.result["tasks"].items()}
    gpus = min(1, context.execution.cluster.gpus_per_worker)
    jobs = [
        (context.inputs[name].path(context.inputs[name].result["model"]), name, tasks, config.max_tokens)
        for name in config.models
    ]
    by_model = dict(zip(config.models, run_tasks(score_model, jobs, cpus=1, gpus=gpus), strict=True))
    results = {name: scored for name, (_, scored) in by_model.items()}
    scores = {
        name: {"chance": chance(load_task(name, uri))}
        | {m: scored[name]["precision_at_1"] for m, scored in results.items()}
        for name, uri in tasks.items()
    }
    ndcg_at_5 = {name: {m: scored[name]["ndcg_at_5"] for m, scored in results.items()} for name in tasks}
    for metric, table in (("precision_at_1", scores), ("ndcg_at_5", ndcg_at_5)):
        for name, row in table.items():
            context.run.log_metrics({f"{metric}/{name}/{model}": value for model, value in row.items()})
    for line in score_table(scores).splitlines():
        context.say(line)
    storage.write_atomic(context.path("scores.md"), score_table(scores).encode())
    storage.write_atomic(context.path("scores.png"), score_bars(scores))
    for name in ("scores.md", "scores.png"):
        context.run.log_artifact(storage.localize(context.path(name)))
    return {
        "scores": scores,
        "ndcg_at_5": ndcg_at_5,
        "queries": {name: task["queries"] for name, task in pairs.result["tasks"].items()},
        "attention": {name: attention for name, (attention, _) in by_model.items()},
    }


def load_task(name: str, uri: str) -> EvalTask:
    tables = (read_table(storage.join(uri, f"{part}.parquet")) for part in ("queries", "candidates"))
    return tables_to_task(name, *tables)


def score_model(
    model_uri: str, label: str, tasks: dict[str, str], max_tokens: int
) -> tuple[Attention, dict[str, dict[str, float]]]:
    """(attention, {task: its metrics}) of one model."""
    from moca_core.embedder import Embedder

    embedder = Embedder(storage.localize(model_uri), max_tokens=max_tokens)
    scores = {}
    for name, uri in tasks.items():
        scores[name] = score_task(embedder, load_task(name, uri))
        print(f"evaluate {label} on {name}: {scores[name]['precision_at_1']:.1%}", flush=True)
    return embedder.attention, scores


def score_task(embedder, task: EvalTask) -> dict[str, float]:
    """Means over queries: "precision_at_1" (MMEB's metric) and "ndcg_at_5" (ViDoRe's)."""
    queries = embedder.encode([query.content for query in task.queries])
    candidates = embedder.encode(task.candidates)
    rows = []
    for query, vector in zip(task.queries, queries, strict=True):
        pool = np.arange(len(candidates)) if query.candidates is None else np.array(query.candidates)
        similarity, right = candidates[pool] @ vector, np.flatnonzero(np.isin(pool, query.positives))
        rows.append((precision_at_1(similarity, right), ndcg(similarity, right, 5)))
    precision, ndcg_at_5 = np.mean(rows, axis=0).tolist()
    return {"precision_at_1": precision, "ndcg_at_5": ndcg_at_5}


def chance(task: EvalTask) -> float:
    """What a model scores that ranks at random."""
    return float(np.mean([chance_at_1(len(q.candidates or task.candidates), len(q.positives)) for q in task.queries]))


def score_table(scores: dict[str, dict[str, float]]) -> str:
    """Markdown table of precision@1, one row per task."""
    columns = list(next(iter(scores.values())))
    width = max(map(len, scores), default=4)
    lines = [
        f"| {'task'.ljust(width)} | {' | '.join(f'{c:>8}' for c in columns)} |",
        f"|{'-' * (width + 2)}|{'|'.join('-' * 9 + ':' for _ in columns)}|",
    ]
    lines += [
        f"| {name.ljust(width)} | {' | '.join(f'{row[c]:>8.1%}' for c in columns)} |" for name, row in scores.items()
    ]
    return "\n".join(lines) + "\n"
