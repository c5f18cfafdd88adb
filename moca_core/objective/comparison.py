"""What of a batch is compared with what, over all ranks: queries with candidates and, for a symmetric loss, answers with queries.

Shapes: B queries and C candidates of this rank, R its rows: (query, right answer) pairs; K the most right answers of a query.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from moca_core.loss.infonce import right_answers
from moca_core.model.inputs import move
from moca_core.types import PairBatch


class GatherRows(Protocol):
    """[n, ...] to the rows of all ranks in their order; `rows`: how many each of them has, where that is known already."""

    def __call__(self, tensor: torch.Tensor, rows: Sequence[int] | None = None) -> torch.Tensor: ...


def _alone(tensor: torch.Tensor, rows: Sequence[int] | None = None) -> torch.Tensor:
    return tensor


@dataclass(frozen=True)
class Gather:
    """How a tensor is collected from all ranks along its first dimension, which may differ between them, and which rank this is.

    `with_grad` must carry gradients back to the rank that a row came from. The defaults are those of a single process.
    """

    rank: int = 0
    with_grad: GatherRows = _alone
    without_grad: GatherRows = _alone


class AnswerRows(NamedTuple):
    """Every (query, right answer) of a rank, and of each query what it is and the groups and contents of its answers."""

    query: torch.Tensor  # [R]
    candidate: torch.Tensor  # [R]
    weight: torch.Tensor  # [R] float32: those of a query add up to 1
    identity: torch.Tensor  # [B] int64
    answers: torch.Tensor  # [B, K, 2] int64, the first repeated where there are fewer than K


def answer_rows(batch: PairBatch, device: torch.device) -> AnswerRows:
    """Worked out from numpy, before the device is asked for anything."""
    positives = np.flatnonzero(batch.candidate_positive)
    positives = positives[np.argsort(batch.candidate_owner[positives], kind="stable")]
    owner, own = batch.candidate_owner[positives], _groups_and_contents(batch)[positives]
    query, first, count = np.unique(owner, return_index=True, return_counts=True)
    assert len(query) == batch.num_queries, "every query needs a right answer"
    answers = np.repeat(own[first][:, None], count.max(), axis=1)
    answers[owner, np.arange(len(owner)) - first[owner]] = own
    weight = (1 / count[owner]).astype(np.float32)
    rows = (owner, positives, weight, batch.candidate_query[positives[first]], answers)
    return AnswerRows(*(move(array, device) for array in rows))


def _groups_and_contents(batch: PairBatch) -> np.ndarray:
    """[C, 2]"""
    return np.stack([batch.candidate_group, batch.candidate_content], axis=1)


class View(NamedTuple):
    """One direction of the comparison, as infonce takes it."""

    rows: torch.Tensor  # [R, D]
    columns: torch.Tensor  # [columns of all ranks, D]
    target: torch.Tensor  # [R]
    left_out: torch.Tensor  # [R, columns of all ranks]


def views(embeddings: torch.Tensor, batch: PairBatch, rows: AnswerRows, gather: Gather, *, both: bool) -> list[View]:
    """This rank's queries against the candidates of all ranks and, if `both`, its right answers against the queries of all."""
    device, (_, most, _) = embeddings.device, rows.answers.shape
    queries, candidates = embeddings.split([batch.num_queries, len(batch.candidate_owner)])
    counts = torch.tensor([[len(queries), len(candidates), most]], device=device)
    num_queries, num_candidates, num_answers = zip(*gather.without_grad(counts).tolist(), strict=True)
    identity = move(np.column_stack([_groups_and_contents(batch), batch.candidate_query]), device)  # [C, 3]
    everyone = gather.without_grad(identity, num_candidates)
    forward = View(
        queries[rows.query],
        gather.with_grad(candidates, num_candidates),
        rows.candidate + sum(num_candidates[: gather.rank]),
        right_answers(rows.answers, rows.identity, everyone[:, :2], everyone[:, 2])[rows.query],
    )
    if not both:
        return [forward]
    padding = rows.answers[:, :1].expand(-1, max(num_answers) - most, -1)
    known = torch.cat([rows.answers, padding], dim=1)  # [B, K of all ranks, 2]
    known, asked = (gather.without_grad(each, num_queries) for each in (known, rows.identity))
    own = identity[rows.candidate]
    backward = View(
        candidates[rows.candidate],
        gather.with_grad(queries, num_queries),
        rows.query + sum(num_queries[: gather.rank]),
        right_answers(known, asked, own[:, :2], own[:, 2]).T,
    )
    return [forward, backward]
