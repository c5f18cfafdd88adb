"""The preflight as the command runs it, once Ray is there and before the first step."""

import time
from collections.abc import Callable
from dataclasses import replace

from cluster.machines import machines, most_of_autoscaler
from cluster.session import on_a_cluster
from pipelines.preflight.check import Finding, check, giga, parts_of, workers_of
from pipelines.preflight.demand import TRAINING, Demand, demands
from pipelines.preflight.model import Model, model_of
from pipelines.recipe import Recipe
from pipelines.runner.plan import Planned

JOINING_S = 60.0  # machines of a cluster that was just started come one after the other


class NoRoom(ValueError):
    """The cluster can never run what is asked of it."""


def preflight(
    recipe: Recipe, plan: list[Planned], say: Callable[[str], None], *, insist: bool = False, at_once: int = 1
) -> None:
    """Says what the steps that are to run need and what there is; of training, what `at_once` such plans need. Raises NoRoom with
    the arithmetic if that can never be enough, unless `insist`. What cannot be known yet is said, and passes."""
    model = _model(recipe, plan, say)
    wanted = [
        replace(demand, workers=at_once * demand.workers, fewest=at_once * demand.fewest)
        if demand.step in TRAINING
        else demand  # what else there is takes turns
        for demand in demands(recipe, plan, model)
    ]
    findings = _waited_for(wanted, recipe.cluster.worker_start_timeout_s)
    for finding in findings:
        if finding.step in TRAINING or not finding.met:
            say(str(finding))
    missing = [finding for finding in findings if finding.met is False]
    if missing and not insist:
        lines = "\n".join(map(str, missing))
        raise NoRoom(
            f"the cluster has no room for this recipe:\n{lines}\n"
            "change what the lines name (docs/clusters.md has settings that fit), or start anyway with --insist"
        )


def needs(recipe: Recipe, plan: list[Planned], say: Callable[[str], None]) -> None:
    """Says what the training steps that are to run need, wherever that may be."""
    for demand in demands(recipe, plan, _model(recipe, plan, say)):
        if demand.step not in TRAINING:
            continue
        say(f"{demand.step:<10}{workers_of(demand)}")
        if demand.device:
            kind = "GPU memory" if demand.gpus else "memory"
            say(f"{'':<10}{kind} of a worker: {giga(demand.device)} GB ({parts_of(demand)})")
            disk = f"disk for temporary files: {giga(demand.scratch)} GB on every machine"
            say(f"{'':<10}object store of a worker: {giga(demand.store)} GB; {disk}")


def _model(recipe: Recipe, plan: list[Planned], say: Callable[[str], None]) -> Model | None:
    if not any(planned.step.name in TRAINING and not planned.done for planned in plan):
        return None
    try:
        return model_of(recipe, plan)
    except (LookupError, OSError, ValueError) as error:
        say(f"memory and disk are not calculated: {error}")
        return None


def _waited_for(wanted: list[Demand], timeout_s: float) -> list[Finding]:
    deadline = time.monotonic() + (min(JOINING_S, timeout_s) if on_a_cluster() else 0)
    while True:
        findings = check(wanted, machines(), most_of_autoscaler())
        if all(finding.met is not False for finding in findings) or time.monotonic() > deadline:
            return findings
        time.sleep(2)
