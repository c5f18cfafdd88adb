r"""InfoNCE over all candidates of all ranks.

    L = - sum_q log( exp(s(q, c_q) / t) / sum over allowed c of exp(s(q, c) / t) )        (paper, Eq. 3)

Candidates are the positives and the hard negatives of every query of the batch. Allowed are the query's own positive and every
candidate that is not the same answer.
"""

import torch
from torch.nn.functional import cross_entropy

from moca_core.loss import LossTerm


def allowed_candidates(
    positive: torch.Tensor, group: torch.Tensor, query: torch.Tensor, valid: torch.Tensor
) -> torch.Tensor:
    """[B, C] mask from the index of each query's positive [B], and of all candidates [C] the answer group, the query that they are
    right for, and whether they are there at all."""
    same_answer = (group[positive][:, None] == group[None]) | (query[positive][:, None] == query[None])
    own = positive[:, None] == torch.arange(len(group), device=group.device)[None]
    return (valid[None] & ~same_answer) | own


def infonce_loss(
    queries: torch.Tensor,
    candidates: torch.Tensor,
    positive: torch.Tensor,
    allowed: torch.Tensor,
    *,
    temperature: float,
) -> tuple[LossTerm, LossTerm]:
    """(loss, accuracy) over queries, each with the number of queries.

    Args:
        queries: [B, D] and candidates: [C, D], unit length. positive: [B], index of each query's right answer.
        allowed: [B, C], True where a candidate is in the denominator.
    Accuracy counts queries whose positive is strictly above every other allowed candidate.
    """
    similarity = queries @ candidates.T
    logits = (similarity / temperature).masked_fill(~allowed, float("-inf"))
    loss = cross_entropy(logits, positive, reduction="sum")
    with torch.no_grad():
        own = logits.gather(1, positive[:, None])
        beaten = (logits >= own).sum(1) == 1
    return LossTerm(loss, len(queries)), LossTerm(beaten.sum().float(), len(queries))
