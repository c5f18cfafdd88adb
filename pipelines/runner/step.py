"""What a step is: a plain function, its settings and what it needs. It reads and writes artifacts and knows no other step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster import storage
from cluster.workers import ClusterConfig
from pipelines.runner.record import Artifact

if TYPE_CHECKING:
    from cluster.tracking import Run


@dataclass(frozen=True)
class Execution:
    """Where and how, never what: nothing in here changes a result, so nothing in here is part of a fingerprint."""

    cluster: ClusterConfig
    log_every_steps: int
    checkpoint_every_steps: int


@dataclass(frozen=True)
class Context:
    """What a step is given: its settings, what it needs, the folder to write to, and where to report."""

    step: str
    config: Any
    inputs: dict[str, Artifact]
    uri: str
    fingerprint: str
    execution: Execution
    run: "Run"
    tracking_uri: str
    say: Callable[[str], None]

    def path(self, *parts: str) -> str:
        return storage.join(self.uri, *parts)

    def keep(self, name: str, data: bytes) -> None:
        """A file for people: in the step's folder and in its tracking run."""
        storage.write_atomic(self.path(name), data)
        self.run.log_artifact(storage.localize(self.path(name)))


@dataclass(frozen=True)
class Step:
    """`run(context)` returns the result that later steps read (literals only; paths relative to the step's folder).

    `code_version` is raised by hand when the code would now make something else of the same settings. A `resumable` step finds
    what an interrupted attempt left in its folder; other steps start in an empty one. `leftovers` are files and folders of it that
    nobody needs when its record stands.
    """

    name: str
    run: Callable[[Context], dict[str, Any]]
    config: Any
    needs: tuple[str, ...] = ()
    code_version: int = 1
    resumable: bool = False
    leftovers: tuple[str, ...] = ()
