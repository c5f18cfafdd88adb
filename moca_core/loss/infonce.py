r"""InfoNCE over all candidates of all ranks.

    L = -sum_q 1/|P_q| sum_{p in P_q} log( e(q, p) / (e(q, p) + sum_{n in N_qp} e(q, n)) ),   e(q, c) = exp(s(q, c) / t_q)    (paper, Eq. 3)

P_q are the right answers to query q in the batch, each of which is a row of its own here. N_qp are the positives and hard negatives of
all queries without those that are right for q: of the same group or content as one of P_q, and answers to an equal query. With a margin m
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
    answers: torch.Tensor, query: torch.Tensor, candidates: torch.Tensor, candidate_query: torch.Tensor
) -> torch.Tensor:
    """[B, C], True where candidate c is known to be right for query b.

    Args:
        answers: [B, K, 2], group and content of each query's positives (any of them repeated where there are fewer than K).
        query: [B], identity of each query. candidates: [C, 2], their groups and contents; either makes one the same answer.
        candidate_query: [C], of the query a candidate is right for.
    """
    right = query[:, None] == candidate_query[None]
    for answer in answers.unbind(1):
        for known, offered in zip(answer.unbind(1), candidates.unbind(1), strict=True):
            right |= known[:, None] == offered[None]
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
    ahead = None if margin is None else margin / temperature.detach()[:, None]
    return Compared(*_Comparison.apply(rows / temperature[:, None], columns, target, left_out, ahead))


class _Comparison(torch.autograd.Function):
    """Logits are by far the largest thing here: there is one matrix of them, and one more in backward."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        rows: torch.Tensor,
        columns: torch.Tensor,
        target: torch.Tensor,
        left_out: torch.Tensor,
        ahead: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        own = target[:, None]
        logits = rows @ columns.T
        right = logits.gather(1, own)
        logits.masked_fill_(left_out, float("-inf")).scatter_(1, own, float("-inf"))
        won = (logits.amax(1, keepdim=True) < right)[:, 0]
        if ahead is not None:
            logits.masked_fill_(logits > right + ahead, float("-inf"))
        logits.scatter_(1, own, right)
        total = logits.logsumexp(1, keepdim=True)
        ctx.save_for_backward(rows, columns, own, logits, total)
        ctx.mark_non_differentiable(logits, won)
        return (total - right)[:, 0], logits, won

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor, *_: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        rows, columns, own, logits, total = ctx.saved_tensors
        shares = (logits - total).exp_()
        shares.scatter_add_(1, own, torch.full_like(total, -1)).mul_(gradient[:, None])
        return shares @ columns, shares.T @ rows, None, None, None
