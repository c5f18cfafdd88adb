"""How sharply queries tell candidates apart: a temperature for every task, given or learned."""

import math

import numpy as np
import torch
from torch import nn

from moca_core.model.inputs import move
from moca_core.objective.contrastive_config import TEMPERATURES


class LearnedTemperature(nn.Module):
    """The logarithm of every task's temperature [tasks], trained from `start`. Its own module, so that ZeRO finds it where it is used."""

    def __init__(self, start: np.ndarray) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.from_numpy(np.log(start)))

    def forward(self) -> torch.Tensor:
        return self.log.clone()


def of_queries(given: np.ndarray, learned: torch.Tensor | None, source: torch.Tensor) -> torch.Tensor:
    """[B] temperatures of queries of the tasks `source` [B]: from the learned logarithms [tasks], or without them as given [tasks]."""
    if learned is None:
        return move(given, source.device)[source]
    low, high = (math.log(bound) for bound in TEMPERATURES)
    log = learned.float()
    # a plain clamp has no gradient outside, and what is outside would never come back
    log = log + (log.clamp(low, high) - log).detach()
    return log.exp()[source]
