"""The forward and backward passes of a step."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from cluster.engine import Engine
from moca_core.loss import LossTerm

Terms = dict[str, LossTerm]
BackwardPass = Callable[[Engine, Any, list[Any], Callable[[Terms], torch.Tensor]], Iterator[Terms]]
"""(engine, objective, batches, terms to this rank's loss) to the terms of every micro-batch, whose gradients the engine then has."""


def whole_batches(
    engine: Engine, objective: Any, batches: list[Any], loss_of: Callable[[Terms], torch.Tensor]
) -> Iterator[Terms]:
    """Every micro-batch in one forward and one backward pass."""
    for number, batch in enumerate(batches, 1):
        terms = engine.forward(batch)
        engine.backward(loss_of(terms), last=number == len(batches))
        yield terms
