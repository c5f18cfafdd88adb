"""The encoder: packed text and images in, one hidden state per token or one embedding per sequence out."""

import torch
from torch import nn
from transformers import PreTrainedModel

from moca_core.model.inputs import DeviceStream
from moca_core.spec import BackboneSpec


class Encoder(nn.Module):
    """A vision-language model without its language head, over packed streams.

    Shapes: T tokens, D hidden size, S sequences. Whether tokens see only what is before them is the backbone's own
    config (see attention.py): the encoder serves the causal base and the bidirectional model alike.
    """

    def __init__(self, backbone: PreTrainedModel, spec: BackboneSpec) -> None:
        super().__init__()
        self.backbone, self.spec = backbone, spec

    def forward(self, stream: DeviceStream) -> torch.Tensor:
        """Last hidden states [T, D], after the final norm."""
        embeddings = self.backbone.get_input_embeddings()(stream.input_ids)
        features = self._image_features(stream)  # [image tokens, D]
        is_image = (stream.input_ids == self.spec.image_token_id)[:, None]
        if len(stream.grid_thw):
            embeddings = embeddings.masked_scatter(is_image, features.to(embeddings.dtype))
        else:
            embeddings = embeddings + 0 * features.sum()
        output = self.backbone.language_model(
            inputs_embeds=embeddings[None], position_ids=stream.position_ids[:, None], use_cache=False, **varlen(stream)
        )
        return output.last_hidden_state[0]

    def embed(self, stream: DeviceStream) -> torch.Tensor:
        """Unit-length float32 embeddings [S, D]: the mean over all tokens of a sequence (paper, section 3.2)."""
        return nn.functional.normalize(mean_pool(self(stream), stream.lengths), dim=-1)

    def _image_features(self, stream: DeviceStream) -> torch.Tensor:
        """Runs the vision tower in every forward, on a blank group of patches where the stream has no image: under ZeRO
        a rank that skips the tower leaves the others waiting for its part for ever."""
        pixel_values, grid_thw = stream.pixel_values, stream.grid_thw
        if not len(grid_thw):
            merge = self.spec.merge_size
            pixel_values = pixel_values.new_zeros(self.spec.group_size, pixel_values.shape[1])
            grid_thw = grid_thw.new_tensor([[1, merge, merge]])
        visual = self.backbone.visual
        return visual(pixel_values.to(visual.dtype), grid_thw=grid_thw).pooler_output


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
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    sums = hidden_states.new_zeros(len(lengths), hidden_states.shape[1], dtype=torch.float32)
    return sums.index_add(0, sequence, hidden_states.float()) / lengths[:, None]
