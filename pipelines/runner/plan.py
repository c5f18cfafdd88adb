"""The plan: for every step its fingerprint, whether it is done, and why it runs or not. Nothing is run to find out."""

import graphlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster import storage
from pipelines.runner import record
from pipelines.runner.fingerprint import canonical, differences, fingerprint
from pipelines.runner.step import Step


@dataclass(frozen=True)
class Planned:
    """A step with its place on storage. `done` is its record if nothing has to run."""

    step: Step
    payload: dict[str, Any]
    fingerprint: str
    uri: str
    done: record.Record | None
    why: str


def make_plan(steps: Sequence[Step], root: str, until: str | None = None) -> list[Planned]:
    """All steps, or those that `until` needs and itself, in an order that respects what they need.

    Raises ValueError for an unknown step and for settings that have no identity (a missing input folder, say).
    """
    by_name = {step.name: step for step in steps}
    wanted = _wanted(by_name, until)
    planned: dict[str, Planned] = {}
    for name in graphlib.TopologicalSorter({n: by_name[n].needs for n in wanted}).static_order():
        planned[name] = _plan_step(by_name[name], planned, root)
    return [planned[step.name] for step in steps if step.name in planned]


def _wanted(by_name: dict[str, Step], until: str | None) -> list[str]:
    if until is None:
        return list(by_name)
    if until not in by_name:
        raise ValueError(f"unknown step {until!r}; the steps are {', '.join(by_name)}")
    return needed(by_name, until)


def needed(by_name: dict[str, Step], goal: str) -> list[str]:
    """The steps that lead to `goal`, and itself."""
    wanted, queue = [], [goal]
    while queue:
        name = queue.pop()
        if name not in wanted:
            wanted.append(name)
            queue += by_name[name].needs
    return wanted


def _plan_step(step: Step, planned: dict[str, Planned], root: str) -> Planned:
    payload = {
        "step": step.name,
        "code_version": step.code_version,
        "config": canonical(step.config),
        "needs": {name: planned[name].fingerprint for name in step.needs},
    }
    mark = fingerprint(payload)
    uri = storage.join(root, step.name, mark)
    done = record.read(uri)
    why = f"unchanged since {done.started}" if done else _reason(step, payload, root)
    return Planned(step, payload, mark, uri, done, why)


def _reason(step: Step, payload: dict, root: str) -> str:
    previous = record.newest(root, step.name)
    if previous is None:
        return "never ran here"
    changed = differences(previous.payload["config"], payload["config"])
    changed += [f"new code (version {payload['code_version']})"] * (
        previous.payload["code_version"] != payload["code_version"]
    )
    old, new = previous.payload["needs"], payload["needs"]
    upstream = [name for name, mark in new.items() if old.get(name, mark) != mark]
    changed += [f"{', '.join(upstream)} changed"] if upstream else []
    changed += [f"with {name}" for name in new if name not in old] + [
        f"without {name}" for name in old if name not in new
    ]
    return "; ".join(changed)
