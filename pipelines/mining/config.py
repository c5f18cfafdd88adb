"""The settings of mining."""

from dataclasses import dataclass, fields
from typing import Any

from cluster import storage

START = "start"


@dataclass(frozen=True)
class MineConfig:
    """`negatives` are mined for every training pair; 0 leaves mining out.

    `model` is "start" for the model that fine-tuning starts from, or an embedding model's folder or URI. With `warmup_steps`
    the recipe's own fine-tuning runs so many steps first, and what comes out mines. `max_tokens`: of a query or an answer, without
    it as in fine-tuning.

    The `top_k` nearest answers of the task that are not right are looked at. The first `skip_top` are passed over, and those that score
    above `max_positive_share` of the right answer's score: likely right answers that nobody marked. The nearest of the others are
    taken, or with `sample` some of them, drawn by `seed`.

    Fine-tuning draws `finetune.num_negatives` of a pair's negatives at random each time the pair comes by. So that mined ones come first,
    a pair's own negatives only fill up what mining leaves free (`keep_given`), and never make them more than `negatives`.
    """

    negatives: int = 0
    model: str = START
    warmup_steps: int = 0
    max_tokens: int | None = None
    top_k: int = 100
    skip_top: int = 0
    max_positive_share: float | None = 0.95
    sample: bool = False
    seed: int = 0
    keep_given: bool = True

    def __post_init__(self) -> None:
        for name in ("negatives", "warmup_steps", "skip_top"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
        if self.warmup_steps and not self.negatives:
            raise ValueError(
                f"mine.warmup_steps={self.warmup_steps} without mine.negatives: there is nothing to warm up for"
            )
        if self.warmup_steps and self.model != START:
            raise ValueError(
                f"model={self.model!r} with warmup_steps={self.warmup_steps}: one of them mines, drop the other"
            )
        if self.top_k < self.skip_top + self.negatives:
            raise ValueError(
                f"top_k={self.top_k} must be at least skip_top + negatives = {self.skip_top + self.negatives}: "
                "negatives are taken from the top_k after the first skip_top"
            )
        if self.max_positive_share is not None and not 0 < self.max_positive_share <= 1:
            raise ValueError(
                f"max_positive_share={self.max_positive_share} must be above 0 and at most 1, or null for no such filter"
            )

    def identity(self) -> dict[str, Any]:
        """A given model is what it holds, wherever it lies."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.model == START:
            return given
        if not storage.exists(storage.join(self.model, "config.json")):
            raise ValueError(
                f"mine.model={self.model!r}: no config.json there; name {START!r} or the folder of an embedding model"
            )
        return given | {"model": storage.digest(self.model)}
