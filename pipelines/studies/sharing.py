"""What runs of a study have in common: a step with the same fingerprint is the same result, and is made once."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.dag import build
from pipelines.runner.plan import Planned, make_plan
from pipelines.studies.family import Run

GOAL = "evaluate"  # a study exports nothing


@dataclass(frozen=True)
class Sharing:
    """Counts of steps: `singly` if every run had a root of its own, `distinct` in one root, `done` of these already."""

    singly: int
    distinct: int
    done: int

    def __str__(self) -> str:
        share = f"{self.distinct / self.singly:.0%}"
        return (
            f"{self.singly} steps if taken singly, {self.distinct} together ({share}): {self.done} of these are done, "
            f"{self.distinct - self.done} to run"
        )


def plan_of(run: Run, root: str) -> list[Planned]:
    return make_plan(build(run.recipe), root, GOAL)


def sharing(plans: Sequence[Sequence[Planned]]) -> Sharing:
    distinct = {planned.fingerprint: planned for plan in plans for planned in plan}
    return Sharing(sum(map(len, plans)), len(distinct), sum(planned.done is not None for planned in distinct.values()))


def seconds(plans: Sequence[Sequence[Planned]]) -> tuple[float, float]:
    """(taken singly, together): what the steps that are done took."""
    done = [planned for plan in plans for planned in plan if planned.done]
    distinct = {planned.fingerprint: planned.done.duration_s for planned in done}
    return sum(planned.done.duration_s for planned in done), sum(distinct.values())
