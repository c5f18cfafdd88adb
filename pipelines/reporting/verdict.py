"""How did it go, in a sentence and a table; and when did which step run?"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pipelines.reporting.sections import duration
from pipelines.runner.outcome import Outcome
from pipelines.runner.record import Record

MET = 0.05  # a p-value below is called a difference


@dataclass
class Verdict:
    """`sentences`, and precision@1: rows of (task, queries, [(score, interval)]) below `columns`."""

    sentences: list[str]
    columns: list[str]
    rows: list[tuple[str, int, list[tuple[float, str]]]]


@dataclass
class Bar:
    """A step on the time axis, `left` and `width` in percent of the run."""

    step: str
    status: str
    left: float
    width: float
    label: str


def verdict(outcome: Outcome, evaluated: dict[str, Any] | None) -> Verdict:
    """`evaluated` is the result of the step evaluate, None where there is none."""
    said = {
        "FINISHED": "The run finished.",
        "FAILED": "The run failed.",
        "KILLED": "The run was interrupted.",
        "RUNNING": "The run has not ended.",
    }[outcome.status]
    if evaluated is None:
        return Verdict([said, "There are no scores: the step evaluate has no result here."], [], [])
    scores = evaluated["scores"]
    columns = list(next(iter(scores.values())))
    means = {name: sum(row[name] for row in scores.values()) / len(scores) for name in columns}
    best = columns[-1]
    against = ", ".join(f"{name} {means[name]:.1%}" for name in columns[:-1])
    mean = f"mean over {len(scores)} tasks; " if len(scores) > 1 else ""
    sentences = [
        said,
        f"{best} puts a right answer first for {means[best]:.1%} of queries ({mean}{against}).",
    ]
    compared = evaluated.get("comparison", {})
    if overall := compared.get("all", compared.get(next(iter(scores)))):  # of a single task there is no other
        sure = "more than chance would explain" if overall["p_value"] < MET else "which chance alone could explain"
        points = {name: f"{100 * value:+.1f}" for name, value in overall["difference"].items()}
        sentences.append(
            f"Against {columns[1]}, on the same queries: {points['mean']} points ({points['low']} to {points['high']}, "
            f"p = {overall['p_value']:.2g}), {sure}."
        )
    intervals = evaluated.get("intervals", {})
    rows = [
        (
            task,
            evaluated["queries"][task],
            [(row[name], _interval(intervals.get(task, {}).get(name))) for name in columns],
        )
        for task, row in scores.items()
    ]
    return Verdict(sentences, columns, rows)


def _interval(found: dict[str, float] | None) -> str:
    return f"{found['low']:.1%} to {found['high']:.1%}" if found else ""


def timeline(outcome: Outcome, records: dict[str, Record]) -> list[Bar]:
    """A bar for every step of the plan, those that were not run without a length."""
    began = datetime.fromisoformat(outcome.started)
    ended = (
        datetime.fromisoformat(outcome.ended)
        if outcome.ended
        else max(
            datetime.fromisoformat(moment)
            for a in outcome.steps
            for moment in (a.started, a.ended, outcome.started)
            if moment
        )
    )
    whole_s = max(1.0, (ended - began).total_seconds())
    bars = []
    for attempt in outcome.steps:
        record = records.get(attempt.step)
        if attempt.status == "skipped":
            made = f"skipped: made {record.started[:10]} in {duration(record.duration_s)}" if record else "skipped"
            bars.append(Bar(attempt.step, "skipped", 0, 0, made))
        elif not attempt.started:
            bars.append(Bar(attempt.step, "waiting", 0, 0, "not run"))
        else:
            start_s = (datetime.fromisoformat(attempt.started) - began).total_seconds()
            end_s = (datetime.fromisoformat(attempt.ended) - began).total_seconds() if attempt.ended else whole_s
            took_s = record.duration_s if record and attempt.status == "done" else end_s - start_s
            note = "" if attempt.status == "done" else f", {attempt.status}"
            left, width = 100 * start_s / whole_s, 100 * (end_s - start_s) / whole_s
            bars.append(Bar(attempt.step, attempt.status, left, width, duration(took_s) + note))
    return bars
