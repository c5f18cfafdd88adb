"""The shallow decoder that paints masked patches (paper, section 3.1): one layer, then a projection to pixels."""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from moca_core.attention import packed_attention
from moca_core.model.inputs import move
from moca_core.spec import BackboneSpec


@dataclass(frozen=True)
class Canvas:
    """What is to be painted, and what the painter sees: M masked groups in sequences of K tokens altogether.

    Sequences without a masked group are left out. `context` [K] are the tokens of the others in the stream, `masked` [M] the masked
    ones among these. Where nothing is masked there is one token, seen and painted, for the decoder to run on at all: under ZeRO-3 a
    rank that skips a module leaves the others waiting.
    """

    context: np.ndarray
    masked: np.ndarray
    context_lengths: np.ndarray  # [sequences]
    masked_counts: np.ndarray  # [sequences]

    @classmethod
    def of(cls, cu_seqlens: np.ndarray, masked_positions: np.ndarray) -> "Canvas":
        """`masked_positions`: ascending places of masked image tokens in the stream."""
        if not len(masked_positions):
            one, zero = np.ones(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
            return cls(zero, zero, one, one)
        starts, lengths = cu_seqlens[:-1].astype(np.int64), np.diff(cu_seqlens).astype(np.int64)
        sequence = np.searchsorted(cu_seqlens, masked_positions, side="right") - 1
        touched, counts = np.unique(sequence, return_counts=True)
        moved = np.cumsum(lengths[touched]) - lengths[touched] - starts[touched]  # of a sequence, stream to context
        context = np.arange(lengths[touched].sum()) - np.repeat(moved, lengths[touched])
        return cls(context, masked_positions + np.repeat(moved, counts), lengths[touched], counts)


class MaeDecoder(nn.Module):
    """Transformer layers copied from the middle of the language tower, which steadies the loss at the start.

    They read all hidden states of a sequence, so that painted patches see text and the patches that were kept; but the last layer has
    only masked image tokens as queries, as nothing else is painted, and only these are projected.
    """

    def __init__(self, backbone: PreTrainedModel, spec: BackboneSpec, depth: int = 1) -> None:
        super().__init__()
        layers = backbone.language_model.layers
        middle = len(layers) // 2
        if not 1 <= depth <= len(layers) - middle:
            raise ValueError(
                f"a decoder of {depth} layers from the middle of {len(layers)}: 1 to {len(layers) - middle}"
            )
        self.layers = nn.ModuleList(copy.deepcopy(layer) for layer in layers[middle : middle + depth])
        self.projection = nn.Linear(spec.text_hidden, spec.group_size * spec.patch_values)
        nn.init.normal_(
            self.projection.weight, std=0.02
        )  # as the authors; patches have unit deviation, so it starts near their mean
        nn.init.zeros_(self.projection.bias)
        self.requires_grad_(True)  # also where the tower that it comes from is frozen

    def forward(
        self, hidden_states: torch.Tensor, position_ids: torch.Tensor, canvas: Canvas, rotary: nn.Module
    ) -> torch.Tensor:
        """Painted groups [M, group_size * patch_values] from hidden states [T, D] and position ids [4, T]."""
        device = hidden_states.device
        context, masked = move(canvas.context, device), move(canvas.masked, device)
        states = hidden_states.index_select(0, context)[None]
        cos_sin = rotary(states, position_ids[1:, None, context])
        cu_k, cu_q = (
            move(np.cumsum([0, *lengths], dtype=np.int32), device)
            for lengths in (canvas.context_lengths, canvas.masked_counts)
        )
        max_k, max_q = int(canvas.context_lengths.max()), int(canvas.masked_counts.max())
        whole = {"cu_seq_lens_q": cu_k, "cu_seq_lens_k": cu_k, "max_length_q": max_k, "max_length_k": max_k}
        for layer in self.layers[:-1]:
            states = layer(states, attention_mask=None, position_embeddings=cos_sin, is_causal=False, **whole)
        partial = whole | {"cu_seq_lens_q": cu_q, "max_length_q": max_q}
        return self.projection(_masked_only(self.layers[-1], states, masked, cos_sin, partial)[0])


def _masked_only(
    layer: nn.Module, states: torch.Tensor, masked: torch.Tensor, cos_sin: tuple, varlen: dict
) -> torch.Tensor:
    """The layer's output at `masked` [M] alone: [1, K, D] to [1, M, D], bidirectional."""
    attention = layer.self_attn
    normed = layer.input_layernorm(states)
    query, key, value = (
        projection(x).view(1, x.shape[1], -1, attention.head_dim)
        for projection, x in (
            (attention.q_proj, normed.index_select(1, masked)),
            (attention.k_proj, normed),
            (attention.v_proj, normed),
        )
    )
    if hasattr(attention, "q_norm"):  # Qwen3
        query, key = attention.q_norm(query), attention.k_norm(key)
    cos, sin = (x[:, :, None] for x in cos_sin)  # [1, K, 1, head_dim]
    query, key = _rotate(query, cos[:, masked], sin[:, masked]), _rotate(key, cos, sin)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    attended, _ = packed_attention(
        attention, query, key, value, None, scaling=attention.scaling, is_causal=False, **varlen
    )
    states = states.index_select(1, masked) + attention.o_proj(attended.flatten(2))
    return states + layer.mlp(layer.post_attention_layernorm(states))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (arXiv 2104.09864) with the halves of a head as the pairs."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
