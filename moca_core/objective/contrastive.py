"""The objective of contrastive fine-tuning: one packed forward, every rank's candidates for every query (paper, section 3.2)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from moca_core.loss import LossTerm
from moca_core.loss.infonce import allowed_candidates, infonce_loss
from moca_core.model.encoder import Encoder
from moca_core.model.inputs import move, to_device
from moca_core.spec import BackboneSpec
from moca_core.types import PairBatch


@dataclass(frozen=True)
class Gather:
    """How a tensor is collected from all ranks along its first dimension, and where this rank's part begins.

    `with_grad` must carry gradients back to the rank that a row came from. The defaults are those of a single process.
    """

    rank: int = 0
    with_grad: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    without_grad: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor


class Contrastive(nn.Module):
    """PairBatch to its loss term "contrastive" and the in-batch "accuracy" (reported, weight 0)."""

    def __init__(
        self, model: PreTrainedModel, spec: BackboneSpec, *, temperature: float = 0.03, gather: Gather = Gather()
    ) -> None:
        super().__init__()
        self.spec, self.temperature, self.gather = spec, temperature, gather
        self.encoder = Encoder(model.model, spec)
        self.weights = {"contrastive": 1.0, "accuracy": 0.0}

    def counts(self, batch: PairBatch) -> dict[str, int]:
        return {"contrastive": batch.num_queries, "accuracy": batch.num_queries}

    def flops(self, batch: PairBatch) -> float:
        """Forward and backward FLOPs of this batch on this rank."""
        return self.encoder.flops(batch.stream)

    def forward(self, batch: PairBatch) -> dict[str, LossTerm]:
        device = self.encoder.backbone.device
        embeddings = self.encoder.embed(to_device(batch.stream, self.spec, device))  # [sequences, D]
        valid, group, query = (
            move(x, device) for x in (batch.candidate_valid, batch.candidate_group, batch.candidate_query)
        )
        queries = embeddings[: batch.num_queries]
        places = move(np.flatnonzero(batch.candidate_valid), device)
        own = embeddings.new_zeros(len(valid), embeddings.shape[1])
        own = own.index_copy(0, places, embeddings[batch.num_queries :])
        per_query = len(valid) // batch.num_queries
        positive = torch.arange(batch.num_queries, device=device) * per_query + self.gather.rank * len(valid)
        allowed = allowed_candidates(positive, *map(self.gather.without_grad, (group, query, valid)))
        loss, accuracy = infonce_loss(
            queries, self.gather.with_grad(own), positive, allowed, temperature=self.temperature
        )
        return {"contrastive": loss, "accuracy": accuracy}
