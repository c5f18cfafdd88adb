"""The objective of continual pre-training: one doubly masked input, two losses (paper, section 3.1)."""

import torch
from torch import nn
from transformers import PreTrainedModel

from moca_core.loss import LossTerm
from moca_core.loss.mae import mae_loss
from moca_core.loss.mlm import mlm_loss
from moca_core.model.encoder import Encoder
from moca_core.model.inputs import add_noise, first_frame, to_device
from moca_core.model.mae_decoder import MaeDecoder
from moca_core.spec import BackboneSpec
from moca_core.types import MaskedBatch


class MaskedModelling(nn.Module):
    """MaskedBatch to its loss terms "mlm" and, unless `mae_weight` is 0, "mae". Their sum is L_MLM + mae_weight * L_MAE.

    With a causal backbone, no masks and every token a label this is ordinary language modelling: how `base` starts a tiny model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        spec: BackboneSpec,
        *,
        mae_weight: float = 0.5,
        shift: bool = True,
        normalise_patches: bool = False,
    ) -> None:
        super().__init__()
        self.spec, self.shift, self.normalise_patches = spec, shift, normalise_patches
        self.encoder = Encoder(model.model, spec)
        self.lm_head = model.lm_head
        self.mae_decoder = MaeDecoder(model.model, spec) if mae_weight else None
        self.weights = {"mlm": 1.0} | ({"mae": mae_weight} if mae_weight else {})

    def counts(self, batch: MaskedBatch) -> dict[str, int]:
        """What each term of `forward` will be a sum over, known before it runs."""
        masked_patches = int(batch.masked_groups.sum()) * self.spec.group_size
        counts = {"mlm": int((batch.labels >= 0).sum()), "mae": masked_patches}
        return {name: counts[name] for name in self.weights}

    def forward(self, batch: MaskedBatch) -> dict[str, LossTerm]:
        device = self.encoder.backbone.device
        stream = to_device(batch.stream, self.spec, device)
        labels = torch.from_numpy(batch.labels).to(device)
        masked_groups = torch.from_numpy(batch.masked_groups).to(device)
        target = first_frame(stream.pixel_values, self.spec)
        stream.pixel_values = add_noise(stream.pixel_values, masked_groups, batch.noise_seed, self.spec)
        hidden_states = self.encoder(stream)
        terms = {"mlm": mlm_loss(hidden_states, labels, self.lm_head, shift=self.shift)}
        if self.mae_decoder is not None:
            masked_tokens = torch.zeros_like(stream.input_ids, dtype=torch.bool)
            masked_tokens[stream.input_ids == self.spec.image_token_id] = masked_groups
            rotary = self.encoder.backbone.language_model.rotary_emb
            painted = self.mae_decoder(hidden_states, stream, masked_tokens, rotary)
            masked_patches = masked_groups.repeat_interleave(self.spec.group_size)
            terms["mae"] = mae_loss(
                painted.view(-1, self.spec.patch_values),
                target[masked_patches],
                normalise_patches=self.normalise_patches,
            )
        return terms
