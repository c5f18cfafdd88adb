"""What became of a run of the pipeline: what was asked for, when each step ran, how it ended. One small file in the root."""

import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Literal

from cluster import storage
from pipelines.runner.plan import Planned

NAME = "run.json"


@dataclass
class Attempt:
    """A step of the run: "skipped" where its result was there, "waiting" until it starts. `folder` is below the root."""

    step: str
    folder: str
    why: str
    status: Literal["skipped", "waiting", "running", "done", "failed"]
    started: str = ""
    ended: str = ""
    tracking_run: str = ""


@dataclass
class Outcome:
    """`changes` are the differences from the recipe `origin`. `error` is what the failed step raised. `file`: its own place below the
    root."""

    root: str
    recipe: str
    origin: str
    changes: list[str]
    left_out: dict[str, str]
    tracking_uri: str
    steps: list[Attempt]
    started: str = field(default_factory=lambda: now())
    ended: str = ""
    status: Literal["RUNNING", "FINISHED", "FAILED", "KILLED"] = "RUNNING"
    error: str = ""
    tracking_run: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    file: str = NAME

    def attempt(self, step: str) -> Attempt:
        return next(attempt for attempt in self.steps if attempt.step == step)

    def uri(self, step: str) -> str:
        """The folder of a step."""
        return storage.join(self.root, self.attempt(step).folder)

    @property
    def failed(self) -> list[str]:
        return [attempt.step for attempt in self.steps if attempt.status == "failed"]

    def write(self) -> None:
        data = json.dumps(asdict(self), indent=2).encode()
        storage.write_atomic(storage.join(self.root, self.file), data)


def attempts(plan: list[Planned]) -> list[Attempt]:
    return [
        Attempt(p.step.name, f"{p.step.name}/{p.fingerprint}", p.why, "skipped" if p.done else "waiting") for p in plan
    ]


def read(root: str) -> Outcome:
    """That of the newest run below a root. Raises ValueError where none was."""
    path = storage.join(root, NAME)
    if not storage.exists(path):
        raise ValueError(f"{root} has no {NAME}: pipelines/full.py writes it when it runs there")
    values = json.loads(storage.read_bytes(path))
    return Outcome(**values | {"steps": [Attempt(**attempt) for attempt in values["steps"]]})


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
