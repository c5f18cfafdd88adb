"""The settings that both training stages share."""

import math
from dataclasses import dataclass
from typing import Literal

from moca_core.parts import Part, require_parts


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Everything that makes a run the same run. Where it runs, with how many workers and at which ZeRO stage, is not in here.

    Parts of the model in `freeze` stay as they are, to the bit. Training ends with an error where a loss or a gradient is not
    finite, and where the mean loss of the last steps is `abort_above` times that of the first ones (0: never).
    """

    steps: int
    learning_rate: float
    warmup_fraction: float = 0.1
    decay: Literal["linear", "cosine", "none"] = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    freeze: tuple[Part, ...] = ()
    abort_above: float = 2.0
    seed: int = 0

    least_steps = 1  # 0 for a stage that a recipe may leave out

    def __post_init__(self) -> None:
        if self.steps < self.least_steps:
            raise ValueError(f"steps={self.steps} must be at least {self.least_steps}")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be positive")
        if not 0 <= self.warmup_fraction < 1:
            raise ValueError(f"warmup_fraction={self.warmup_fraction} must be at least 0 and below 1")
        if self.max_grad_norm < 0:
            raise ValueError(f"max_grad_norm={self.max_grad_norm} must be positive, or 0 for no clipping")
        if self.abort_above and self.abort_above <= 1:
            raise ValueError(f"abort_above={self.abort_above} must be above 1, or 0 for never")
        require_parts(self.freeze)

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up from above 0 to the peak, then decay towards 0 at the end of the last step."""
        warmup = round(self.steps * self.warmup_fraction)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        factor = {"linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2, "none": 1.0}[self.decay]
        return self.learning_rate * factor


@dataclass(frozen=True, kw_only=True)
class StageConfig(TrainingConfig):
    """What pre-training and fine-tuning share beyond that: validation, and which weights come out.

    About `validation_fraction` of the rows are held out of training, in whole steps; every `validate_every_steps` steps and after the
    last their loss is taken. `keep="best"` writes the model of the lowest such loss, "last" that of the last step. The model after
    each of the steps in `snapshots` is written too, beside it, for the step `average`.
    """

    validation_fraction: float = 0.0
    validate_every_steps: int = 0
    keep: Literal["last", "best"] = "last"
    snapshots: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.validation_fraction < 0.5:
            raise ValueError(f"validation_fraction={self.validation_fraction} must be at least 0 and below 0.5")
        if bool(self.validation_fraction) != (self.validate_every_steps > 0):
            raise ValueError(
                f"validation_fraction={self.validation_fraction} with validate_every_steps={self.validate_every_steps}: set both, or "
                "leave both 0"
            )
        if self.keep == "best" and not self.validation_fraction:
            raise ValueError("keep='best' needs a loss to compare: set validation_fraction and validate_every_steps")
        if wrong := [step for step in self.snapshots if not 0 < step < self.steps]:
            raise ValueError(f"snapshots={wrong} must be steps between 1 and steps - 1 = {self.steps - 1}")

    def validates_after(self, done: int) -> bool:
        """Whether validation follows the first `done` steps."""
        return self.validate_every_steps > 0 and (done % self.validate_every_steps == 0 or done == self.steps)
