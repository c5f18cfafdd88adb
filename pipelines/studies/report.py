"""Everything that a study says, as files: report.md, scores.csv, study.json and pictures."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cluster import storage, tracking
from pipelines.pictures.studies import curve_panels, loss_panels, variant_bars
from pipelines.studies.collect import Result, result_of
from pipelines.studies.curves import curves_of, fits_markdown, paper_curves
from pipelines.studies.family import Run
from pipelines.studies.losses import losses_of
from pipelines.studies.sharing import plan_of, seconds, sharing
from pipelines.studies.table import lines_of, markdown, scores_csv

BASELINE = "no_pretraining"


def write_report(
    runs: Sequence[Run],
    failures: dict[str, str],
    root: str,
    folder: str,
    study: tracking.Run,
    metric: str | None = None,
) -> str:
    """Writes what the runs came to below `folder`, logs it to the study's MLflow run, and returns report.md. Scores are by each task's
    main metric, or by that one."""
    plans = {run.name: plan_of(run, root) for run in runs}
    results = [result for run in runs if (result := result_of(run, plans[run.name], metric))]
    singly_s, together_s = seconds(list(plans.values()))
    count = (
        f"{sharing(list(plans.values()))}. What is done took {together_s:.0f} s; every run by itself would have taken "
        f"{singly_s:.0f} s.\n"
    )
    files, text = scores(runs, results) if results else ({}, "No run is finished.\n")
    text = f"Scores: {metric or 'the main metric of each task'}, in points.\n\n{text}"
    if losses := losses_of(runs, plans):
        files["losses.png"] = loss_panels(losses)
    text += "\n" + count + "".join(f"\nFailed: {name}: {error}\n" for name, error in failures.items())
    files["report.md"] = text.encode()
    with tempfile.TemporaryDirectory() as local:
        for name, content in files.items():
            storage.write_atomic(storage.join(folder, name), content)
            Path(local, name).write_bytes(content)
            study.log_artifact(f"{local}/{name}")
    study.log_params({"metric": metric or "main"})
    study.log_metrics({f"score/{result.variant}/seed{result.seed}": result.score for result in results})
    return text


def scores(runs: Sequence[Run], results: Sequence[Result]) -> tuple[dict[str, bytes], str]:
    """(files, what report.md says of them)."""
    lines = lines_of(list(dict.fromkeys(run.variant for run in runs)), results)
    curves = curves_of(runs, results)
    said = [asdict(line) | {"mean": line.overall.mean, "told_apart": line.overall.verdict} for line in lines]
    files = {
        "scores.csv": scores_csv(results),
        "study.json": json.dumps(said, indent=2, allow_nan=False).encode(),
        "variants.png": variant_bars(lines, results[0].chance),
    }
    text = markdown(lines)
    if (chance := results[0].chance) is not None:
        text += f"\nBy chance {100 * chance:.1f}.\n"
    if curves:
        start = next((line.overall.mean for line in lines if line.variant.name == BASELINE), None)
        files["scaling.png"] = curve_panels("score, mean over tasks (dotted: without pre-training)", curves, start)
        files["paper.png"] = curve_panels("the paper's MMEB precision@1", paper_curves())
        text += f"\nPoints per doubling:\n\n{fits_markdown(curves)}\nThe paper's:\n\n{fits_markdown(paper_curves())}"
    return files, text
