r"""InfoNCE over all candidates of all ranks.

    L = -sum_q 1/|P_q| sum_{p in P_q} log( e(q, p) / (e(q, p) + sum_{n in N_qp} e(q, n)) ),   e(q, c) = exp(s(q, c) / t_q)    (paper, Eq. 3)

P_q are the right answers to query q in the batch, each of which is a row of its own here. N_qp are the positives and hard negatives of
all queries without those that are right for q: answers of the same group as one of P_q, and answers to an equal query. With a margin m
those with s(q, n) > s(q, p) + m are left out too: what beats a right answer so clearly is likely to be one (Qwen3-VL-Embedding, arXiv
2601.04720). Turned round, positives against queries, it is the same function.
"""

from typing import NamedTuple

import torch


class Compared(NamedTuple):
    """What came of every row: its loss, its logits without gradient (-inf where a column was left out), and whether it is won."""

    loss: torch.Tensor  # [R]
    logits: torch.Tensor  # [R, C]
    won: torch.Tensor  # [R] bool


def right_answers(
    answers: torch.Tensor, query: torch.Tensor, group: torch.Tensor, candidate_query: torch.Tensor
) -> torch.Tensor:
    """[B, C], True where candidate c is known to be right for query b.

    Args:
        answers: [B, K], answer groups of each query's positives (any of them repeated where there are fewer than K).
        query: [B], identity of each query. group: [C], candidate_query: [C], of the query a candidate is right for.
    """
    right = query[:, None] == candidate_query[None]
    for column in answers.unbind(1):
        right |= column[:, None] == group[None]
    return right


def infonce(
    rows: torch.Tensor,
    columns: torch.Tensor,
    target: torch.Tensor,
    left_out: torch.Tensor,
    temperature: torch.Tensor,
    *,
    margin: float | None = None,
) -> Compared:
    """Minus the log of the target's share of all columns that are not left out, of every row.

    Args:
        rows: [R, D] and columns: [C, D], unit length. target: [R], the right column of each row. temperature: [R].
        left_out: [R, C], True where a column is not in the denominator; never for the target, which always is.
        margin: leaves out, too, columns whose similarity is above the target's by more than this. It decides without gradient.
    A row is won if its target is strictly above every other column; one that the margin leaves out is above it.
    """
    own = target[:, None]
    logits = (rows / temperature[:, None]) @ columns.T  # [R, C], the only copy: all else is done in place
    logits.masked_fill_(left_out.scatter(1, own, False), float("-inf"))
    with torch.no_grad():
        right = logits.gather(1, own)
        won = (logits >= right).sum(1) == 1
    if margin is not None:
        with torch.no_grad():
            above = logits > right + margin / temperature[:, None]
        logits.masked_fill_(above, float("-inf"))
    loss = logits.logsumexp(1) - logits.gather(1, own)[:, 0]
    return Compared(loss, logits.detach(), won)
