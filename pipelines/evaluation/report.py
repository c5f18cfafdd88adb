"""What rankings say: scores with intervals, averages as papers print them, comparisons; as Markdown, JSON and CSV."""

import csv
import io
from dataclasses import asdict, dataclass

import numpy as np

from cluster import storage
from moca_core import benchmarks
from moca_core.benchmarks import BenchmarkTask
from moca_core.significance import Comparison, Interval, compare, interval
from pipelines.evaluation.engine import Evaluated
from pipelines.evaluation.scoring import METRICS
from pipelines.evaluation.tasks import StoredTask
from pipelines.tables import read_table

Values = dict[str, dict[str, dict[str, np.ndarray]]]
"""{model: {task: {metric: a value per query}}}"""


def read_values(evaluated: Evaluated, uri: str) -> Values:
    def by_metric(path: str) -> dict[str, np.ndarray]:
        read = read_table(storage.join(uri, path), columns=[*METRICS, "chance"])
        return {name: read[name].to_numpy() for name in read.column_names}

    return {m: {task: by_metric(path) for task, path in paths.items()} for m, paths in evaluated.rankings.items()}


@dataclass(frozen=True)
class Average:
    """The mean over some tasks of a benchmark; `tasks` of them were scored, and `of` there are."""

    benchmark: str
    name: str
    tasks: int
    of: int
    scores: dict[str, Interval]


def averages(values: Values, tasks: tuple[StoredTask, ...]) -> list[Average]:
    """Of every benchmark that a task belongs to: meta-tasks, in and out of distribution, all, each as a mean over tasks."""
    found = []
    scored = {task.name: task for task in tasks}
    for benchmark in dict.fromkeys(task.known.benchmark for task in tasks if task.known):
        members = [task for task in benchmarks.tasks().values() if task.benchmark == benchmark]
        groups: dict[str, list[BenchmarkTask]] = {}
        for task in members:
            groups.setdefault(task.meta_task, []).append(task)
        groups["IND"] = [task for task in members if task.in_distribution is True]
        groups["OOD"] = [task for task in members if task.in_distribution is False]
        groups["all"] = members
        for name, group in groups.items():
            if there := [scored[task.name] for task in group if task.name in scored]:
                scores = {m: interval([of[t.name][t.metric] for t in there]) for m, of in values.items()}
                found.append(Average(benchmark, name, len(there), len(group), scores))
    return found


def comparisons(values: Values, tasks: tuple[StoredTask, ...], ours: str, theirs: str) -> dict[str, Comparison]:
    """{task: `ours` against `theirs` by its main metric}, and over all tasks under "all" where they are several."""
    pairs = {
        task.name: (values[ours][task.name][task.metric], values[theirs][task.name][task.metric]) for task in tasks
    }
    found = {name: compare([a], [b]) for name, (a, b) in pairs.items()}
    if len(pairs) > 1:
        found["all"] = compare([a for a, _ in pairs.values()], [b for _, b in pairs.values()])
    return found


def document(values: Values, evaluated: Evaluated, compared: dict[str, Comparison], pair: tuple[str, str]) -> dict:
    """All of it, as scores.json holds it; `compared` are of the first of the `pair` against the second."""
    return {
        "models": {
            reader.label: {k: v for k, v in asdict(reader).items() if k != "label"} for reader in evaluated.readers
        },
        "tasks": {task.name: _task(task, values) for task in evaluated.tasks},
        "averages": [asdict(average) for average in averages(values, evaluated.tasks)],
        "comparison": {name: asdict(comparison) for name, comparison in compared.items()},
        "compared": list(pair),
    }


def _task(task: StoredTask, values: Values) -> dict:
    first, known = next(iter(values.values()))[task.name], task.known
    about = {name: getattr(known, name) for name in ("benchmark", "meta_task", "in_distribution")} if known else {}
    return {
        "queries": len(first["chance"]),
        "metric": task.metric,
        "prompts": asdict(task.prompts),
        **about,
        "chance": float(first["chance"].mean()),
        "scores": {
            model: {metric: asdict(interval([of[task.name][metric]])) for metric in METRICS}
            for model, of in values.items()
        },
    }


def scores_csv(scores: dict) -> bytes:
    """A line for every model, task and metric; of mteb's tasks the main one, without an interval."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["model", "task", "benchmark", "meta_task", "metric", "mean", "low", "high", "queries", "main"])
    for name, task in scores.get("mteb", {"tasks": {}})["tasks"].items():
        for model, score in task["scores"].items():
            lines.writerow([model, name, "mteb", "", task["metric"], score, "", "", "", 1])
    for name, task in scores.get("tasks", {}).items():
        for model, by_metric in task["scores"].items():
            for metric, score in by_metric.items():
                about = [task.get("benchmark", ""), task.get("meta_task", ""), metric]
                lines.writerow([model, name, *about, *score.values(), task["queries"], int(metric == task["metric"])])
    return text.getvalue().encode()


def markdown(scores: dict) -> str:
    """For a person: scores by task, averages as the MMEB paper's table 1 has them, and the comparison."""
    models = list(scores["models"])
    parts = ["## Scores by task, with 95 % intervals\n", task_table(scores, models)]
    for benchmark in dict.fromkeys(average["benchmark"] for average in scores["averages"]):
        parts += [f"## {benchmark}: means over tasks\n", average_table(scores["averages"], benchmark, models)]
    if scores["comparison"]:
        ours, theirs = scores["compared"]
        parts += [f"## {ours} against {theirs}, on the same queries\n", comparison_table(scores["comparison"])]
    return "\n".join(parts)


def task_table(scores: dict, models: list[str]) -> str:
    rows = []
    for name, task in scores["tasks"].items():
        means = [task["scores"][model][task["metric"]] for model in models]
        shown = [f"{m['mean']:.1%} ({100 * m['low']:.1f} to {100 * m['high']:.1f})" for m in means]
        rows.append([name, task["metric"], f"{task['queries']}", *shown])
    return table(["task", "metric", "queries", *models], rows)


def average_table(averages: list[dict], benchmark: str, models: list[str]) -> str:
    columns = [average for average in averages if average["benchmark"] == benchmark]
    names = [c["name"] + ("" if c["tasks"] == c["of"] else f" ({c['tasks']} of {c['of']} tasks)") for c in columns]
    rows = [[model, *(f"{100 * column['scores'][model]['mean']:.1f}" for column in columns)] for model in models]
    return table(["model", *names], rows)


def comparison_table(compared: dict[str, dict]) -> str:
    rows = []
    for name, comparison in compared.items():
        d = comparison["difference"]
        points = f"{100 * d['mean']:+.1f} ({100 * d['low']:+.1f} to {100 * d['high']:+.1f})"
        rows.append([name, points, f"{comparison['p_value']:.4f}"])
    return table(["task", "difference in points", "p"], rows)


def mteb_markdown(found: dict[str, dict], models: list[str]) -> str:
    """Main scores of mteb's tasks, as mteb says them."""
    rows = [[name, task["metric"], *(f"{100 * task['scores'][m]:.1f}" for m in models)] for name, task in found.items()]
    if len(found) > 1:
        means = [np.mean([task["scores"][m] for task in found.values()]) for m in models]
        rows.append(["mean", "", *(f"{100 * mean:.1f}" for mean in means)])
    return "## By mteb\n\n" + table(["task", "metric", *models], rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table: names to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = [
        "| "
        + " | ".join(c.ljust(w) if n == 0 else c.rjust(w) for n, (c, w) in enumerate(zip(row, widths, strict=True)))
        + " |"
        for row in [head, *rows]
    ]
    rule = "|" + "|".join("-" * (w + 2) if n == 0 else "-" * (w + 1) + ":" for n, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"
