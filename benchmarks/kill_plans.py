"""What is killed in which run, and what is said of the run afterwards."""

import time
from dataclasses import dataclass

from watched_command import Command, Outcome, Place, in_words

VICTIMS = ("worker", "driver", "node")


@dataclass(frozen=True)
class Plan:
    """A run: who is killed, one after the other, and when the first of them."""

    name: str
    victims: tuple[str, ...]
    clustered: bool
    when: str


@dataclass(frozen=True)
class Hit:
    """A kill: of whom, when, how long after training began and how far it was."""

    who: str
    when: float
    training_s: float
    place: Place


@dataclass(frozen=True)
class Row:
    """What came of a run. `lost_s`: from the first kill until training was further than ever before the last one."""

    name: str
    killed: str
    where: str
    at_s: float
    restarts: int
    lost_s: float
    weights: str
    rows: str

    def good(self) -> bool:
        return self.weights == "equal" and self.rows == "each once"

    def line(self) -> str:
        return (
            f"{self.name:>7}  {self.killed:<38} {self.where:<20} at {self.at_s:5.1f} s  restarts {self.restarts}  "
            f"lost {self.lost_s:5.1f} s  weights {self.weights}  rows {self.rows}"
        )


@dataclass(frozen=True)
class Reference:
    """An undisturbed run: its name, what came of it (an Outcome), and how long its stages took."""

    name: str
    outcome: dict
    stages_s: list[float]


def plans(runs: int, aimed: bool) -> list[Plan]:
    drawn = []
    for number in range(runs):
        victim = VICTIMS[number % 3]
        clustered = victim == "node" or number // 3 % 2 == 1
        drawn.append(Plan(str(number + 1), (victim,), clustered, "any step" if number % 2 else "any time"))
    if aimed:
        drawn.append(Plan("early", ("worker",), clustered=False, when="before a checkpoint"))
        drawn.append(Plan("upload", ("worker",), clustered=True, when="in an upload"))
        drawn.append(Plan("twice", ("node", "driver"), True, "any step"))
        drawn.append(Plan("again", ("worker", "worker"), False, "any step"))
    return drawn


def judge(plan: Plan, hits: list[Hit], command: Command, found: Outcome, expected: Outcome) -> Row:
    first, last = hits[0], hits[-1]
    lost_s = (command.passed(last.place) or time.monotonic()) - first.when
    same = {stage: digest == expected.weights[stage] for stage, digest in found.weights.items()}
    once = {stage: consumed == expected.consumed[stage] for stage, consumed in found.consumed.items()}
    weights = "equal" if all(same.values()) else f"DIFFER {found.weights}"
    rows = "each once" if all(once.values()) else f"DIFFER {found.consumed}"
    where = in_words(first.place)
    return Row(plan.name, whom(hits), where, first.training_s, found.restarts, lost_s, weights, rows)


def whom(hits: list[Hit]) -> str:
    return ", then ".join(hit.who for hit in hits)
