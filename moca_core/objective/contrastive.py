"""The objective of contrastive fine-tuning: one packed forward, every rank's candidates for every query (paper, section 3.2)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from moca_core.data import chunks
from moca_core.loss import LossTerm
from moca_core.loss.infonce import Compared, infonce
from moca_core.model.encoder import Encoder
from moca_core.model.inputs import move, to_device
from moca_core.objective.comparison import Gather, View, answer_rows, views
from moca_core.objective.contrastive_config import ContrastiveConfig
from moca_core.objective.pair_statistics import pair_statistics
from moca_core.objective.temperature import LearnedTemperature, of_queries
from moca_core.spec import BackboneSpec
from moca_core.types import PairBatch, TokenStream


class Encoded(NamedTuple):
    """What the loss is computed from: unit-length float32 embeddings of sequences, and the logarithm of every task's temperature
    where it is learned."""

    embeddings: torch.Tensor  # [S, D]
    log_temperature: torch.Tensor | None  # [tasks]


class Contrastive(nn.Module):
    """PairBatch to its loss term "contrastive", the in-batch "accuracy" (reported, weight 0) and the observation "pairs"
    (pair_statistics.py); or a part of its stream to what `score` makes the same terms of (gradcache.py).

    `tasks` are the sorted names of all tasks, to which a batch's `source` refers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        spec: BackboneSpec,
        config: ContrastiveConfig | None = None,
        *,
        tasks: Sequence[str] = ("",),
        gather: Gather | None = None,
    ) -> None:
        super().__init__()
        config = config or ContrastiveConfig()
        self.spec, self.config, self.tasks, self.gather = spec, config, tuple(tasks), gather or Gather()
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

    def chunks(self, batch: PairBatch, count: int) -> list[TokenStream]:
        """The stream of the batch in `count` parts; behind as many as it has sequences they are repetitions."""
        return chunks.cut(batch.stream, count, self.spec)

    def chunks_needed(self, batch: PairBatch, budget_tokens: int) -> int:
        """In how many parts no forward has more than so many tokens, or than the longest sequence."""
        return chunks.parts_needed(batch.stream, budget_tokens)

    def forward(self, batch: PairBatch | TokenStream) -> dict[str, LossTerm] | Encoded:
        return self.encode(batch) if isinstance(batch, TokenStream) else self.score(self.encode(batch.stream), batch)

    def encode(self, stream: TokenStream) -> Encoded:
        embeddings = self.encoder.embed(to_device(stream, self.spec, self.encoder.backbone.device))
        return Encoded(embeddings, None if self.temperature is None else self.temperature())

    def score(self, encoded: Encoded, batch: PairBatch) -> dict[str, LossTerm]:
        """The loss terms of the batch from the embeddings of its sequences. Collective, forward and backward."""
        rows = answer_rows(batch, encoded.embeddings.device)
        source = move(batch.source, encoded.embeddings.device)
        temperature = of_queries(self.temperatures, encoded.log_temperature, source)[rows.query]
        directions = views(encoded.embeddings, batch, rows, self.gather, both=self.config.symmetric)
        compared = [self._compare(view, width, temperature) for view in directions for width in self.widths]
        first = compared[0]  # queries against candidates, at full width
        statistics = pair_statistics(
            first,
            target=directions[0].target,
            temperature=temperature,
            weight=rows.weight,
            source=source[rows.query],
            tasks=len(self.tasks),
        )
        terms = {
            "contrastive": sum((each.loss * rows.weight).sum() for each in compared) / len(compared),
            "accuracy": (first.won * rows.weight).sum(),
            "pairs": statistics,
        }
        return {name: LossTerm(value, batch.num_queries) for name, value in terms.items()}

    def _compare(self, view: View, width: int, temperature: torch.Tensor) -> Compared:
        rows, columns = view.rows, view.columns
        if width < self.widths[0]:
            rows, columns = (normalize(x[:, :width], dim=-1) for x in (rows, columns))
        margin = self.config.false_negative_margin
        return infonce(rows, columns, view.target, view.left_out, temperature, margin=margin)
