"""The objective of contrastive fine-tuning: one packed forward, every rank's candidates for every query (paper, section 3.2).

Shapes: S sequences, B queries and C candidates of this rank, R rows of the loss: its (query, right answer) pairs; D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from moca_core.loss import LossTerm
from moca_core.loss.infonce import Compared, infonce, right_answers
from moca_core.model.encoder import Encoder
from moca_core.model.inputs import move, to_device
from moca_core.objective.contrastive_config import ContrastiveConfig
from moca_core.objective.temperature import LearnedTemperature, of_queries
from moca_core.spec import BackboneSpec
from moca_core.types import PairBatch, TokenStream


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


class Encoded(NamedTuple):
    """What the loss is computed from: unit-length float32 embeddings of sequences, and the logarithm of every task's temperature
    where it is learned."""

    embeddings: torch.Tensor  # [S, D]
    log_temperature: torch.Tensor | None  # [tasks]


class Contrastive(nn.Module):
    """PairBatch to its loss term "contrastive" and the in-batch "accuracy" (reported, weight 0).

    `tasks` are the sorted names of all tasks, to which a batch's `source` refers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        spec: BackboneSpec,
        config: ContrastiveConfig | None = None,
        *,
        tasks: Sequence[str] = ("",),
        gather: Gather = Gather(),
    ) -> None:
        super().__init__()
        config = config or ContrastiveConfig()
        self.spec, self.config, self.tasks, self.gather = spec, config, tuple(tasks), gather
        self.widths = config.widths(spec.text_hidden)
        self.temperatures = np.array(config.task_temperatures(tasks), dtype=np.float32)
        self.temperature = LearnedTemperature(self.temperatures) if config.learn_temperature else None
        self.encoder = Encoder(model.model, spec)
        self.weights = {"contrastive": 1.0, "accuracy": 0.0}

    def counts(self, batch: PairBatch) -> dict[str, int]:
        return {"contrastive": batch.num_queries, "accuracy": batch.num_queries}

    def flops(self, batch: PairBatch) -> float:
        """Forward and backward FLOPs of this batch on this rank."""
        return self.encoder.flops(batch.stream)

    def forward(self, batch: PairBatch) -> dict[str, LossTerm]:
        return self.score(self.encode(batch.stream), batch)

    def encode(self, stream: TokenStream) -> Encoded:
        embeddings = self.encoder.embed(to_device(stream, self.spec, self.encoder.backbone.device))
        return Encoded(embeddings, None if self.temperature is None else self.temperature())

    def score(self, encoded: Encoded, batch: PairBatch) -> dict[str, LossTerm]:
        """The loss terms of the batch from the embeddings of its sequences. Collective, forward and backward."""
        rows = answer_rows(batch).on(encoded.embeddings.device)
        temperature = of_queries(self.temperatures, encoded.log_temperature, batch.source, rows.query.device)[
            rows.query
        ]
        views = self._views(encoded.embeddings, batch, rows)
        total = 0.0
        for view in views:
            for width in self.widths:
                compared = self._compare(view, width, temperature)
                total = total + (compared.loss * rows.weight).sum() / (len(views) * len(self.widths))
                if view is views[0] and width == self.widths[0]:
                    won = (compared.won * rows.weight).sum()
        return {"contrastive": LossTerm(total, batch.num_queries), "accuracy": LossTerm(won, batch.num_queries)}

    def _compare(self, view: "View", width: int, temperature: torch.Tensor) -> Compared:
        rows, columns = view.rows, view.columns
        if width < self.widths[0]:
            rows, columns = (normalize(x[:, :width], dim=-1) for x in (rows, columns))
        margin = self.config.false_negative_margin
        return infonce(rows, columns, view.target, view.left_out, temperature, margin=margin)

    def _views(self, embeddings: torch.Tensor, batch: PairBatch, rows: "AnswerRows") -> "list[View]":
        """This rank's queries against the candidates of all ranks, and its right answers against the queries of all."""
        device, rank, most = embeddings.device, self.gather.rank, rows.answers.shape[1]
        queries, candidates = embeddings.split([batch.num_queries, len(batch.candidate_owner)])
        counts = torch.tensor([[len(queries), len(candidates), most]], device=device)
        num_queries, num_candidates, num_answers = zip(*self.gather.without_grad(counts).tolist(), strict=True)
        identity = torch.stack(
            [move(x, device) for x in (batch.candidate_group, batch.candidate_query)], dim=1
        )  # [C, 2]
        group, answered = self.gather.without_grad(identity, num_candidates).unbind(1)
        forward = View(
            queries[rows.query],
            self.gather.with_grad(candidates, num_candidates),
            rows.candidate + sum(num_candidates[:rank]),
            right_answers(rows.answers, rows.identity, group, answered)[rows.query],
        )
        if not self.config.symmetric:
            return [forward]
        padding = rows.answers[:, :1].expand(-1, max(num_answers) - most)
        known = torch.cat([rows.identity[:, None], rows.answers, padding], dim=1)  # [B, 1 + K]
        known = self.gather.without_grad(known, num_queries)
        right = right_answers(known[:, 1:], known[:, 0], *identity[rows.candidate].unbind(1))  # [queries of all, R]
        backward = View(
            candidates[rows.candidate],
            self.gather.with_grad(queries, num_queries),
            rows.query + sum(num_queries[:rank]),
            right.T,
        )
        return [forward, backward]


class View(NamedTuple):
    """One direction of the comparison, as infonce takes it."""

    rows: torch.Tensor  # [R, D]
    columns: torch.Tensor  # [columns of all ranks, D]
    target: torch.Tensor  # [R]
    left_out: torch.Tensor  # [R, columns of all ranks]


class AnswerRows(NamedTuple):
    """Every (query, right answer) of a rank, and of each query what it is and the groups of its answers."""

    query: np.ndarray  # [R]
    candidate: np.ndarray  # [R]
    weight: np.ndarray  # [R] float32: those of a query add up to 1
    identity: np.ndarray  # [B] int64
    answers: np.ndarray  # [B, K] int64, the first repeated where there are fewer than K

    def on(self, device: torch.device) -> "AnswerRows":
        return AnswerRows(*(move(array, device) for array in self))


def answer_rows(batch: PairBatch) -> AnswerRows:
    positives = np.flatnonzero(batch.candidate_positive)
    positives = positives[np.argsort(batch.candidate_owner[positives], kind="stable")]
    query, first, count = np.unique(batch.candidate_owner[positives], return_index=True, return_counts=True)
    assert len(query) == batch.num_queries, "every query needs a right answer"
    owner, group = batch.candidate_owner[positives], batch.candidate_group[positives]
    answers = np.repeat(group[first][:, None], count.max(), axis=1)
    answers[owner, np.arange(len(owner)) - first[owner]] = group
    weight = (1 / count[owner]).astype(np.float32)
    return AnswerRows(owner, positives, weight, batch.candidate_query[positives[first]], answers)
