"""The shallow decoder that paints masked patches (paper, section 3.1): one layer, then a projection to pixels."""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from moca_core.model.encoder import varlen
from moca_core.model.inputs import DeviceStream
from moca_core.spec import BackboneSpec


class MaeDecoder(nn.Module):
    """One transformer layer copied from the middle of the language tower, which steadies the loss at the start.

    It reads all hidden states, so that painted patches see text and the patches that were kept; only masked image tokens are projected.
    """

    def __init__(self, backbone: PreTrainedModel, spec: BackboneSpec) -> None:
        super().__init__()
        language = backbone.language_model
        self.layer = copy.deepcopy(language.layers[len(language.layers) // 2])
        self.projection = nn.Linear(spec.text_hidden, spec.group_size * spec.patch_values)
        nn.init.normal_(
            self.projection.weight, std=0.02
        )  # as the authors; patches have unit deviation, so it starts near their mean
        nn.init.zeros_(self.projection.bias)

    def forward(
        self, hidden_states: torch.Tensor, stream: DeviceStream, masked_tokens: torch.Tensor, rotary: nn.Module
    ) -> torch.Tensor:
        """Painted groups [masked groups, group_size * patch_values] at the tokens marked in `masked_tokens` [T]."""
        states = hidden_states[None]
        position_embeddings = rotary(states, stream.position_ids[1:, None])
        states = self.layer(
            states, position_embeddings=position_embeddings, is_causal=False, attention_mask=None, **varlen(stream)
        )
        return self.projection(states[0][masked_tokens])
