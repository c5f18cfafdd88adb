"""The settings that both training stages share."""

import math
from dataclasses import dataclass
from typing import Literal

from moca_core.parts import Part, require_parts


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Everything that makes a run the same run. Where it runs, with how many workers and at which ZeRO stage, is not in here.

    Parts of the model in `freeze` stay as they are, to the bit.
    """

    steps: int
    learning_rate: float
    warmup_fraction: float = 0.1
    decay: Literal["linear", "cosine", "none"] = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    freeze: tuple[Part, ...] = ()
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
        require_parts(self.freeze)

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up from above 0 to the peak, then decay towards 0 at the end of the last step."""
        warmup = round(self.steps * self.warmup_fraction)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        factor = {"linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2, "none": 1.0}[self.decay]
        return self.learning_rate * factor
