"""The objective of continual pre-training: one doubly masked input, two losses (paper, section 3.1)."""

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from moca_core import flops
from moca_core.loss import LossTerm
from moca_core.loss.mae import mae_loss, painted_values
from moca_core.loss.mlm import LanguageHead, mlm_loss
from moca_core.model.encoder import Encoder
from moca_core.model.inputs import DeviceStream, denormalise, first_frame, move, to_device, unit_noise
from moca_core.model.mae_decoder import Canvas, MaeDecoder
from moca_core.reconstruction import GUESSES, Answer, Question
from moca_core.spec import BackboneSpec
from moca_core.types import MaskedBatch


class MaskedModelling(nn.Module):
    """MaskedBatch to its loss terms "mlm" and "mae", of which a weight of 0 leaves out its own with all that it needs.

    The loss is mlm_weight * L_MLM + mae_weight * L_MAE. With a causal backbone, no masks and every token a label this is ordinary
    language modelling: how `base` starts a tiny model. Of a Question it gives the Answer instead, for people to look at.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        spec: BackboneSpec,
        *,
        mlm_weight: float = 1.0,
        mae_weight: float = 0.5,
        shift: bool = True,
        normalise_patches: bool = False,
        decoder_layers: int = 1,
    ) -> None:
        super().__init__()
        assert mlm_weight or mae_weight, "an objective without any loss"
        self.spec, self.shift, self.normalise_patches = spec, shift, normalise_patches
        self.encoder = Encoder(model.model, spec)
        self.lm_head = LanguageHead(model.lm_head) if mlm_weight else None
        self.mae_decoder = MaeDecoder(model.model, spec, decoder_layers) if mae_weight else None
        weights = {"mlm": mlm_weight, "mae": mae_weight}
        self.weights = {name: weight for name, weight in weights.items() if weight}

    def counts(self, batch: MaskedBatch) -> dict[str, int]:
        """What each term of `forward` will be a sum over, known before it runs."""
        masked_patches = int(batch.masked_groups.sum()) * self.spec.group_size
        counts = {"mlm": int((batch.labels >= 0).sum()), "mae": masked_patches}
        return {name: counts[name] for name in self.weights}

    def flops(self, batch: MaskedBatch) -> float:
        """Forward and backward FLOPs of this batch, for the parts that are there and the weights that are trained."""
        total = self.encoder.flops(batch.stream)
        flowing = self.encoder.trains
        if self.lm_head is not None:
            head = flops.head_flops(self.spec, self.counts(batch)["mlm"])
            total += head.trained(weights=self.lm_head.weight.requires_grad, inputs=flowing)
        if self.mae_decoder is not None and batch.masked_groups.any():
            canvas, depth = self._canvas(batch), len(self.mae_decoder.layers)
            painting = flops.mae_flops(self.spec, canvas.context_lengths, canvas.masked_counts, depth)
            total += painting.trained(inputs=flowing)
        return total

    def forward(self, batch: MaskedBatch | Question) -> dict[str, LossTerm] | Answer:
        if isinstance(batch, Question):
            return self._answer(batch)
        stream, target, _ = self._masked_stream(batch)
        hidden_states = self.encoder(stream)
        terms = {}
        if self.lm_head is not None:
            device = hidden_states.device
            positions = np.flatnonzero(batch.labels >= 0)
            targets = move(batch.labels[positions], device)
            terms["mlm"] = mlm_loss(hidden_states, move(positions, device), targets, self.lm_head, shift=self.shift)
        if self.mae_decoder is not None:
            painted = self._paint(batch, stream, hidden_states)
            terms["mae"] = mae_loss(painted, target, normalise_patches=self.normalise_patches)
        return terms

    @torch.no_grad()
    def _answer(self, question: Question) -> Answer:
        """The same pass, for what stands behind the losses. It calls the same modules in the same order: ZeRO-3 counts on that."""
        stream, target, noise = self._masked_stream(question.batch)
        hidden_states = self.encoder(stream)
        seen = rebuilt = guesses = probabilities = None
        if self.lm_head is not None:
            places = move(question.words - 1 if self.shift else question.words, hidden_states.device)
            best = self.lm_head(hidden_states.index_select(0, places), None, guesses=GUESSES)
            guesses, probabilities = (part.cpu().numpy() for part in best)
        if self.mae_decoder is not None:
            painted = self._paint(question.batch, stream, hidden_states)
            painted = painted_values(painted, target, normalise_patches=self.normalise_patches)
            seen, rebuilt = (denormalise(v, self.spec).cpu().numpy() for v in (first_frame(noise, self.spec), painted))
        return Answer(seen, rebuilt, guesses, probabilities)

    def _masked_stream(self, batch: MaskedBatch) -> tuple[DeviceStream, torch.Tensor, torch.Tensor]:
        """(the stream with noise in the place of masked patches, what these were [masked patches, patch_values], the noise)."""
        device = self.encoder.backbone.device
        stream = to_device(batch.stream, self.spec, device)
        masked_patches = move(np.flatnonzero(batch.masked_groups.repeat(self.spec.group_size)), device)
        target = first_frame(stream.pixel_values[masked_patches], self.spec)
        noise = unit_noise(batch.noise_seeds, self._masked_per_sequence(batch), stream.pixel_values)
        stream.pixel_values = stream.pixel_values.index_copy(0, masked_patches, noise)
        return stream, target, noise

    def _paint(self, batch: MaskedBatch, stream: DeviceStream, hidden_states: torch.Tensor) -> torch.Tensor:
        """[masked patches, patch_values]"""
        rotary = self.encoder.backbone.language_model.rotary_emb
        painted = self.mae_decoder(hidden_states, stream.position_ids, self._canvas(batch), rotary)
        return painted[: int(batch.masked_groups.sum())].reshape(-1, self.spec.patch_values)

    def _masked_positions(self, batch: MaskedBatch) -> np.ndarray:
        return np.flatnonzero(batch.stream.input_ids == self.spec.image_token_id)[batch.masked_groups]

    def _masked_per_sequence(self, batch: MaskedBatch) -> np.ndarray:
        """[S], in patches."""
        ends = np.searchsorted(self._masked_positions(batch), batch.stream.cu_seqlens)
        return np.diff(ends) * self.spec.group_size

    def _canvas(self, batch: MaskedBatch) -> Canvas:
        return Canvas.of(batch.stream.cu_seqlens, self._masked_positions(batch))
