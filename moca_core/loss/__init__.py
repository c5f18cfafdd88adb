"""Losses: tensors in, a sum and a count out. No model, no process group, no config in here."""

from typing import NamedTuple

import torch


class LossTerm(NamedTuple):
    """A loss as its sum over `count` elements, so that parts from any rank and micro-batch add up to the exact mean."""

    sum: torch.Tensor
    count: int
