"""Settings of the contrastive loss. No torch here: the step that holds them also runs in data workers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

TEMPERATURES = (0.01, 1.0)
"""Between these a learned temperature stays: below, a float32 softmax of similarities is a maximum; above, it is flat."""


@dataclass(frozen=True)
class ContrastiveConfig:
    """How queries and candidates are compared (loss/infonce.py).

    `temperature` is that of every task but those named in `temperatures`; with `learn_temperature` each task's is trained from there,
    between 0.01 and 1. `false_negative_margin`: candidates that are more similar to a query than its right answer by more than this are
    no negatives of it. `symmetric` averages in the loss of every right answer against all queries. `matryoshka_dims`: the loss is the
    mean over the full width and these prefixes of the embedding, which then are embeddings too.
    """

    temperature: float = 0.03
    temperatures: dict[str, float] = field(default_factory=dict)
    learn_temperature: bool = False
    false_negative_margin: float | None = None
    symmetric: bool = False
    matryoshka_dims: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        low, high = TEMPERATURES if self.learn_temperature else (0.0, math.inf)
        for name, value in {"temperature": self.temperature, **self.temperatures}.items():
            if not (low <= value <= high and 0 < value < math.inf):
                bounds = f"between {low} and {high} to be learned" if self.learn_temperature else "positive"
                raise ValueError(f"temperature of {name!r} is {value}, and must be {bounds}")
        margin = self.false_negative_margin
        if margin is not None and not 0 <= margin < 2:
            raise ValueError(f"false_negative_margin={margin} must be at least 0 and below 2, or none to leave it off")
        dims = tuple(self.matryoshka_dims)  # a YAML file brings a list
        object.__setattr__(self, "matryoshka_dims", dims)
        if len(set(dims)) < len(dims) or any(dim < 1 for dim in dims):
            raise ValueError(f"matryoshka_dims={list(dims)} must be different positive numbers")

    def task_temperatures(self, tasks: Sequence[str]) -> list[float]:
        """Of each of these tasks. ValueError for temperatures of tasks that are not among them."""
        if unknown := sorted(set(self.temperatures) - set(tasks)):
            raise ValueError(f"temperatures names {', '.join(unknown)}; the tasks are {', '.join(tasks)}")
        return [self.temperatures.get(task, self.temperature) for task in tasks]

    def widths(self, full: int) -> tuple[int, ...]:
        """Of the embeddings that are compared, the full one first. ValueError for a prefix that is not shorter."""
        if wide := [dim for dim in self.matryoshka_dims if dim >= full]:
            raise ValueError(f"matryoshka_dims {wide} must be below the embedding's own {full}")
        return (full, *self.matryoshka_dims)
