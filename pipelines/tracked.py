"""Running a plan under MLflow: one parent run, one nested run per step, and a line on the screen for whatever happens."""

import json
import platform
import subprocess
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

from cluster import tracking
from cluster.workers import connect
from pipelines.preflight.run import NoRoom, preflight
from pipelines.recipe import Recipe
from pipelines.runner.fingerprint import canonical
from pipelines.runner.outcome import Outcome, now
from pipelines.runner.plan import Planned
from pipelines.runner.record import Artifact
from pipelines.runner.scheduler import StepFailed, run_plan
from pipelines.runner.step import Context, Execution

LIBRARIES = ("torch", "transformers", "ray", "deepspeed", "pyarrow", "mlflow")
CLOCK = time.perf_counter()


def run_tracked(
    recipe: Recipe,
    plan: list[Planned],
    outcome: Outcome,
    tracker: tracking.Tracker,
    *,
    insist: bool = False,
    name: str | None = None,
    study: tracking.Run | None = None,
    at_once: int = 1,
) -> dict[str, Artifact]:
    """Runs the plan under one MLflow parent run, with one nested run per step. `outcome` is kept up to date in the root.
    That parent run is called `name`, and is itself nested in that of a `study`, which runs so many plans `at_once`.

    Raises NoRoom before the first step where the cluster can never hold what is asked of it, unless `insist`.
    """
    root, tracking_uri = outcome.root, outcome.tracking_uri
    versions = outcome.environment = environment()
    parent = tracker.start_run(name or f"pipeline {Path(root).name}", parent=study, tags={"root": root, **versions})
    parent.log_params(flatten(canonical_settings(recipe)))
    outcome.tracking_run = parent.run_id
    outcome.write()
    execution = Execution(recipe.cluster, recipe.tracking.log_every_steps, recipe.tracking.checkpoint_every_steps)

    open_runs: list[tracking.Run] = [parent]

    def execute(planned: Planned, inputs: dict[str, Artifact]) -> tuple[dict, str]:
        step = planned.step.name
        label = f"{name} {step}" if study else step
        run = tracker.start_run(step, parent=parent, tags={"fingerprint": planned.fingerprint, "why": planned.why})
        open_runs.append(run)
        run.log_params(flatten(planned.payload["config"]))
        attempt = outcome.attempt(step)
        attempt.status, attempt.started, attempt.tracking_run = "running", now(), run.run_id
        outcome.write()
        say(label, f"started ({planned.why})")
        started, status = time.perf_counter(), "failed"
        context = Context(
            step=step,
            config=planned.step.config,
            inputs=inputs,
            uri=planned.uri,
            fingerprint=planned.fingerprint,
            execution=execution,
            run=run,
            tracking_uri=tracking_uri,
            say=lambda message: say(label, message),
        )
        try:
            result = planned.step.run(context)
            run.finish("FINISHED")
            status = "done"
        finally:
            attempt.status, attempt.ended = status, now()
            outcome.write()
            say(label, f"{status if status == 'done' else 'FAILED'} after {time.perf_counter() - started:.0f} s")
            open_runs.remove(run)
            if status == "failed":
                run.finish("FAILED")
        return result, run.run_id

    status = "FAILED"
    try:
        for planned in plan:
            if planned.done:
                log_skipped(tracker, parent, planned)
        if not all(planned.done for planned in plan):
            connect(recipe.cluster)
            preflight(recipe, plan, partial(say, "preflight"), insist=insist, at_once=at_once)
        artifacts = run_plan(plan, execute, versions)
        for attempt in outcome.steps:
            if attempt.status == "waiting":
                attempt.status, attempt.why = "skipped", "made meanwhile by another run"
        status = "FINISHED"
    except StepFailed as failure:
        outcome.error = str(cause_of(failure))
        raise
    except NoRoom as error:
        outcome.error = str(error)
        raise
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        outcome.status, outcome.ended = status, now()
        outcome.write()
        for run in reversed(open_runs):
            run.finish(status)
    return artifacts


def cause_of(failure: StepFailed) -> BaseException | None:
    """What the step raised; of what Ray wraps, what the user should read."""
    return getattr(failure.__cause__, "cause", None) or failure.__cause__


def log_skipped(tracker: tracking.Tracker, parent: tracking.Run, planned: Planned) -> None:
    say(planned.step.name, f"skipped ({planned.why})")
    tags = {"fingerprint": planned.fingerprint, "skipped": planned.why, "made_by_run": planned.done.tracking_run}
    tracker.start_run(planned.step.name, parent=parent, tags=tags).finish("FINISHED")


def canonical_settings(recipe: Recipe) -> dict:
    """The recipe as plain values, paths included: what the user asked for, for the tracking page."""
    return canonical({name: settings(getattr(recipe, name)) for name in recipe.__dataclass_fields__})


def settings(value):
    if hasattr(value, "__dataclass_fields__"):
        return {name: settings(getattr(value, name)) for name in value.__dataclass_fields__}
    return [settings(item) for item in value] if isinstance(value, tuple) else value


def flatten(value, prefix: str = "") -> dict[str, str]:
    """{"a": {"b": 1}} to {"a.b": "1"}."""
    if isinstance(value, dict):
        return {
            k: v for key, item in value.items() for k, v in flatten(item, f"{prefix}.{key}" if prefix else key).items()
        }
    return {prefix: value if isinstance(value, str) else json.dumps(value)}


def environment() -> dict[str, str]:
    """What a result came out of, for its record."""
    versions = {name: version(name) for name in LIBRARIES}
    versions |= {"python": platform.python_version(), "platform": platform.platform()}
    folder = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
        versions["commit"] = commit.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        versions["commit"] = "unknown"  # an installed package or an uploaded working directory has no history
    return versions


def say(step: str, message: str) -> None:
    sys.stdout.write(
        f"[{time.perf_counter() - CLOCK:6.1f} s] {step:<9} {message}\n"
    )  # in one piece: steps share the screen
    sys.stdout.flush()
