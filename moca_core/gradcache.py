"""GradCache: a contrastive batch of any size in the memory of a part of it (arXiv 2101.06983), with the gradient of the whole.

A loss over all pairs reaches the weights through the embeddings alone. So all parts are embedded without keeping anything for
backward, the loss and its gradient g with respect to every embedding are computed once, and then each part is embedded again and
(embeddings * g).sum() taken back into the weights: at the price of a second forward, parts need their activations one at a time.
"""

from collections.abc import Callable
from typing import Protocol

import torch

from moca_core.loss import LossTerm
from moca_core.objective.contrastive import Contrastive, Encoded
from moca_core.types import PairBatch, TokenStream


class Backward(Protocol):
    """Adds the gradient of a scalar; `last` on the last of a step."""

    def __call__(self, loss: torch.Tensor, *, last: bool) -> None: ...


def cached_step(
    objective: Contrastive,
    batch: PairBatch,
    count: int,
    *,
    forward: Callable[[TokenStream], Encoded],
    backward: Backward,
    loss_of: Callable[[dict[str, LossTerm]], torch.Tensor],
) -> dict[str, LossTerm]:
    """The loss terms of the batch, without gradient; their gradient went to `backward`, `count` times, as from one forward of all.

    `count` parts on every rank (objective.chunks). `forward` and `backward` are the engine's, with `objective` inside. `loss_of` makes
    of the terms the scalar that the plain step would take backward.
    """
    parts = objective.chunks(batch, count)
    with torch.no_grad():
        encoded = [forward(part) for part in parts]
    sequences = len(batch.stream.cu_seqlens) - 1  # parts behind them are repetitions
    embeddings = torch.cat([part.embeddings for part in encoded])[:sequences].requires_grad_()
    log_temperature = encoded[0].log_temperature
    if log_temperature is not None:
        log_temperature = log_temperature.detach().requires_grad_()
    whole = Encoded(embeddings, log_temperature)
    terms = objective.score(whole, batch)
    gradient, *of_temperature = torch.autograd.grad(loss_of(terms), [leaf for leaf in whole if leaf is not None])
    done = 0
    for number, part in enumerate(parts):
        again = forward(part)
        rows = gradient[done : done + len(again.embeddings)]
        done += len(rows)
        loss = (again.embeddings * _filled(rows, len(again.embeddings))).sum()
        for once in of_temperature:  # in every part, so that no rank waits for it, but counted in the first
            loss = loss + (again.log_temperature * (once if number == 0 else 0 * once)).sum()
        backward(loss, last=number == count - 1)
    return {name: LossTerm(term.sum.detach(), term.count) for name, term in terms.items()}


def _filled(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Zeros below: repeated sequences have no gradient."""
    return torch.cat([rows, rows.new_zeros(count - len(rows), rows.shape[1])])
