"""The forward and backward passes of a step: a micro-batch whole, or cut into chunks that fit the memory (GradCache)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from cluster.engine import Engine
from moca_core.gradcache import cached_step
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
        yield {name: LossTerm(term.sum.detach(), term.count) for name, term in terms.items()}  # the graph goes


@dataclass(frozen=True)
class InChunks:
    """A contrastive batch of any size: about `tokens` of a rank at a time hold activations, for the price of another forward pass.

    All ranks take as many chunks as the one that needs most (`max_over_ranks`), as under ZeRO-3 they wait for each other in every
    layer. A batch that fits is passed whole.
    """

    tokens: int
    max_over_ranks: Callable[[int], int]

    def __call__(
        self, engine: Engine, objective: Any, batches: list[Any], loss_of: Callable[[Terms], torch.Tensor]
    ) -> Iterator[Terms]:
        (batch,) = batches
        count = self.max_over_ranks(objective.chunks_needed(batch, self.tokens))
        if count == 1:
            yield from whole_batches(engine, objective, batches, loss_of)
        else:
            passes = {"forward": engine.forward, "backward": engine.backward, "loss_of": loss_of}
            yield cached_step(objective, batch, count, **passes)
