"""The encoder: packed text and images in, one hidden state per token or one embedding per sequence out."""

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from moca_core.attention import attention_of
from moca_core.flops import language_flops, vision_flops
from moca_core.model.inputs import DeviceStream
from moca_core.spec import BackboneSpec
from moca_core.types import TokenStream


class Encoder(nn.Module):
    """A vision-language model without its language head, over packed streams.

    Shapes: T tokens, D hidden size, S sequences. Whether tokens see only what is before them is the backbone's own
    config (see attention.py): the encoder serves the causal base and the bidirectional model alike.
    """

    def __init__(self, backbone: PreTrainedModel, spec: BackboneSpec) -> None:
        super().__init__()
        self.backbone, self.spec = backbone, spec
        # before any engine takes the weights apart
        self._trained = {
            name: _trained_share(part)
            for name, part in (
                ("vision", backbone.visual),
                ("language", backbone.language_model.layers),
                ("all", backbone),
            )
        }

    @property
    def trains(self) -> bool:
        """Whether any weight is trained, so that gradients flow back into the hidden states."""
        return self._trained["all"] > 0

    def flops(self, stream: TokenStream) -> float:
        """Forward and backward FLOPs of both towers, by the share of their weights that is trained."""
        vision, language = self._trained["vision"], self._trained["language"]
        seen = vision_flops(self.spec, stream.grid_thw.tolist())
        read = language_flops(self.spec, np.diff(stream.cu_seqlens).tolist())
        return seen.trained(weights=vision, inputs=vision > 0) + read.trained(weights=language, inputs=self.trains)

    def forward(self, stream: DeviceStream) -> torch.Tensor:
        """Last hidden states [T, D], after the final norm."""
        language = self.backbone.language_model
        embeddings = self.backbone.get_input_embeddings()(stream.input_ids)
        features, deeper = self._see(stream)
        if len(stream.image_positions):
            states = embeddings.index_copy(0, stream.image_positions, features.to(embeddings.dtype))[None]
        else:
            states = (embeddings + 0 * sum(x.sum() for x in (features, *deeper)))[None]
            deeper = []
        rotary = language.rotary_emb(states, stream.position_ids[1:, None])
        causal = attention_of(self.backbone) == "causal"
        for number, layer in enumerate(language.layers):
            states = layer(states, attention_mask=None, position_embeddings=rotary, is_causal=causal, **varlen(stream))
            if number < len(deeper):
                states = states.index_add(1, stream.image_positions, deeper[number][None].to(states.dtype))
        return language.norm(states)[0]

    def embed(self, stream: DeviceStream) -> torch.Tensor:
        """Unit-length float32 embeddings [S, D]: the mean over all tokens of a sequence (paper, section 3.2)."""
        return nn.functional.normalize(mean_pool(self(stream), stream.lengths), dim=-1)

    def _see(self, stream: DeviceStream) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Features of all images [image tokens, D], and those that are added behind the first language layers (Qwen3-VL).

        The vision tower runs in every forward, on a blank group of patches where the stream has no image: under ZeRO a rank
        that skips the tower leaves the others waiting for its part for ever.
        """
        visual = self.backbone.visual
        output = visual(stream.pixel_values.to(visual.dtype), grid_thw=stream.grid_thw, **stream.vision_inputs)
        return output.pooler_output, getattr(output, "deepstack_features", None) or []


def _trained_share(module: nn.Module) -> float:
    """Of the weights: 1 without frozen ones, near 0 with adapters alone."""
    counts = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(n for n, trained in counts if trained) / sum(n for n, _ in counts)


def varlen(stream: DeviceStream) -> dict:
    """Keyword arguments that tell every attention layer where sequences begin and end."""
    return {
        "cu_seq_lens_q": stream.cu_seqlens,
        "cu_seq_lens_k": stream.cu_seqlens,
        "max_length_q": stream.max_seqlen,
        "max_length_k": stream.max_seqlen,
    }


def mean_pool(hidden_states: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Mean hidden state of every sequence: [T, D] and [S] to [S, D], in float32."""
    numbers = torch.arange(len(lengths), device=lengths.device)
    sequence = torch.repeat_interleave(numbers, lengths, output_size=len(hidden_states))
    sums = hidden_states.new_zeros(len(lengths), hidden_states.shape[1], dtype=torch.float32)
    return sums.index_add(0, sequence, hidden_states.float()) / lengths[:, None]
