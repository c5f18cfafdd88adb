"""Running a study: its runs in one root, where a step that several have in common is made by the first of them."""

import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial

from cluster import storage, tracking
from cluster.workers import connect
from pipelines.preflight.run import preflight
from pipelines.recipe import named_recipe, origin
from pipelines.runner.fingerprint import differences
from pipelines.runner.outcome import Outcome, attempts
from pipelines.runner.scheduler import StepFailed
from pipelines.studies.collect import Result, result_of
from pipelines.studies.family import Run
from pipelines.studies.sharing import plan_of
from pipelines.tracked import canonical_settings, cause_of, run_tracked, say


def run_all(
    runs: Sequence[Run],
    *,
    recipe: str,
    root: str,
    folder: str,
    tracking_uri: str,
    tracker: tracking.Tracker,
    study: tracking.Run,
    at_once: int = 1,
    insist: bool = False,
) -> dict[str, str]:
    """Runs what is not finished, each in an MLflow run below the `study`'s, so many of them `at_once`. Returns {run: error} of those that
    failed.

    A failure ends its own run alone; a run that has the failed step too is not started. What became of a run is below `folder`.
    """
    start = origin(recipe)
    usual = canonical_settings(named_recipe(start))
    failures: dict[str, str] = {}
    broken: dict[str, str] = {}  # {fingerprint of a step: its error}
    runs = [run for run in runs if not all(planned.done for planned in plan_of(run, root))]
    started, ended = time.monotonic(), []

    def finish(number: int, run: Run) -> None:
        plan = plan_of(run, root)
        if errors := [broken[planned.fingerprint] for planned in plan if planned.fingerprint in broken]:
            failures[run.name] = errors[0]
            return
        say("study", f"run {number} of {len(runs)}: {run.name}")
        outcome = Outcome(
            root=root,
            recipe=recipe,
            origin=start,
            changes=differences(usual, canonical_settings(run.recipe)),
            left_out={},
            tracking_uri=tracking_uri,
            steps=attempts(plan),
            file=storage.join(folder, "runs", f"{run.name}.json"),
        )
        named = {"name": run.name, "study": study, "at_once": at_once, "insist": insist}
        try:
            run_tracked(run.recipe, plan, outcome, tracker, **named)
        except StepFailed as failure:
            cause = cause_of(failure)
            if not isinstance(cause, (ValueError, FileNotFoundError, FloatingPointError)):
                traceback.print_exception(cause)
            failures[run.name] = f"{failure}: {cause}"
            print(f"error: {run.name}: {failures[run.name]}", file=sys.stderr)
            broken.update({p.fingerprint: failures[run.name] for p in plan if p.step.name == failure.step})
        else:
            result = result_of(run, plan_of(run, root))
            tracked = tracking.attach(tracking_uri, outcome.tracking_run)
            tracked.log_metrics(metrics_of(result))
            tracked.flush()
            ended.append(run)
            left_s = (time.monotonic() - started) / len(ended) * (len(runs) - len(ended) - len(failures))
            say(
                "study",
                f"{run.name} scores {100 * result.score:.1f}; {len(ended)} of {len(runs)} done, about {left_s / 60:.0f} min left",
            )

    if at_once == 1:  # in this thread, where an interrupt is heard
        for number, run in enumerate(runs, 1):
            finish(number, run)
        return failures
    if runs:  # asked once before they start side by side, each to be refused by itself
        connect(runs[0].recipe.cluster)
        preflight(runs[0].recipe, plan_of(runs[0], root), partial(say, "preflight"), insist=insist, at_once=at_once)
    pool = ThreadPoolExecutor(max_workers=at_once, thread_name_prefix="run")
    try:
        left = {pool.submit(finish, number, run) for number, run in enumerate(runs, 1)}
        while left:  # a wait without end does not hear an interrupt that another thread of this process was given
            done, left = wait(left, timeout=0.5, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # an interrupt must not wait for a training run
    return failures


def metrics_of(result: Result) -> dict[str, float]:
    by_task = {f"score/{task}": score for task, score in result.by_task.items()}
    return {"score": result.score, "tokens": result.tokens, "flops": result.flops, **by_task}
