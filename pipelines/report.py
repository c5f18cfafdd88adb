"""The report of a pipeline run: one HTML file that a colleague can open, made from records and files alone.

    python pipelines/report.py --root runs/demo

pipelines/full.py makes it at the end of every run, also of one that failed.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from cluster import storage, tracking
from pipelines.reporting.gallery import gallery
from pipelines.reporting.pages import page
from pipelines.reporting.sections import moment, section
from pipelines.reporting.verdict import timeline, verdict
from pipelines.runner import outcome as outcomes
from pipelines.runner import record
from pipelines.runner.outcome import Outcome
from pipelines.runner.record import Record

NAME = "report.html"
QUERIES_PER_TASK = 4


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python pipelines/report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", required=True, help="folder or s3:// URI that pipelines/full.py wrote to")
    options = parser.parse_args(arguments)
    try:
        print(write_report(options.root))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write_report(root: str) -> str:
    """Writes report.html of the newest run below a root and logs it to the run's MLflow; returns where it is.

    A root that was moved has its MLflow elsewhere: there the file is all.
    """
    root = root if not storage.is_local(root) else str(Path(root.removeprefix("file://")).absolute())
    outcome = outcomes.read(root)
    moved, outcome.root = outcome.root != root, root
    html = render(outcome)
    storage.write_atomic(storage.join(root, NAME), html)
    if not moved:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, NAME).write_bytes(html)
            tracking.attach(outcome.tracking_uri, outcome.tracking_run).log_artifact(f"{folder}/{NAME}")
    return storage.join(root, NAME)


def render(outcome: Outcome) -> bytes:
    found = {attempt.step: record.read(outcome.uri(attempt.step)) for attempt in outcome.steps}
    records: dict[str, Record] = {step: made for step, made in found.items() if made is not None}
    sections = [section(attempt, outcome.uri(attempt.step), records.get(attempt.step)) for attempt in outcome.steps]
    evaluated = records["evaluate"].result if "evaluate" in records else None
    exported = storage.join(outcome.uri("export"), "model") if "export" in records else None
    model, tasks = found_by_the_last(outcome, records)
    return page(
        "report.html",
        title=f"{Path(outcome.recipe).stem}: {Path(outcome.root).name}",
        when=moment(outcome.started) + (f" to {moment(outcome.ended)}" if outcome.ended else ""),
        outcome=outcome,
        failed=outcome.failed,
        verdict=verdict(outcome, evaluated),
        warnings=[(part.step, warning) for part in sections for warning in part.warnings],
        bars=timeline(outcome, records),
        sections=sections,
        model=model,
        tasks=tasks,
        exported=exported,
    )


def found_by_the_last(outcome: Outcome, records: dict[str, Record]) -> tuple[str, list]:
    """(the exported model's stage, its gallery), from the rankings that evaluate has kept."""
    if not {"pairs", "evaluate"} <= records.keys():
        return "", []
    rankings = records["evaluate"].result.get("rankings", {})
    if not rankings:
        return "", []
    model, by_task = list(rankings.items())[-1]
    pairs, evaluate = (outcome.uri(step) for step in ("pairs", "evaluate"))
    tasks = {name: storage.join(pairs, task["path"]) for name, task in records["pairs"].result["tasks"].items()}
    ranked = {name: storage.join(evaluate, by_task[name]) for name in tasks}
    return model, gallery(tasks, ranked, QUERIES_PER_TASK)


if __name__ == "__main__":
    sys.exit(main())
