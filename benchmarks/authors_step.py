"""The authors' way of a pre-training step, as benchmarks/step.py times it (reference: paper's released code, in our own words).

Documents go into buckets by cost (text tokens + 4 times image tokens), every micro-batch fills a budget and is padded to its longest
document. Activations of every layer are computed again in the backward pass, logits are made for all positions, the MAE decoder
runs over the whole padded sequence and paints both temporal copies of a patch. Kept as quick as ours: attention on the same varlen
kernel, without padding (theirs is FlashAttention 2), and the same patch embedding.
"""

import copy

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from moca_core.attention import packed_attention
from moca_core.data.positions import position_ids
from moca_core.loss import LossTerm
from moca_core.model.inputs import move, to_device, unit_noise
from moca_core.recompute import set_recompute
from moca_core.types import MaskedBatch

BUDGET = 12_800  # cost of a micro-batch
IMAGE_COST, BUCKET_GROWTH = 4, 1.3
IMPLEMENTATION = "authors_padded"


def buckets(documents: list[MaskedBatch], spec, max_tokens: int, budget: int = BUDGET) -> list[list[MaskedBatch]]:
    """Micro-batches of documents of similar cost, which counts an image token as four and ends at `max_tokens`."""
    thresholds = sorted({min(max_tokens, 32 * int(BUCKET_GROWTH**i)) for i in range(64)} - {0})
    by_threshold: dict[int, list[MaskedBatch]] = {threshold: [] for threshold in thresholds}
    batches = []
    for document in documents:
        images = int((document.stream.input_ids == spec.image_token_id).sum())
        cost = len(document.stream.input_ids) + (IMAGE_COST - 1) * images + 2 * len(document.stream.grid_thw)
        threshold = next(t for t in thresholds if t >= min(cost, max_tokens))
        bucket = by_threshold[threshold]
        bucket.append(document)
        if len(bucket) == max(1, budget // threshold):
            batches.append(bucket)
            by_threshold[threshold] = []
    return batches + [bucket for bucket in by_threshold.values() if bucket]


class PaddedModelling(nn.Module):
    """MLM and MAE over a padded batch, as loss terms."""

    def __init__(self, model, spec) -> None:
        super().__init__()
        AttentionInterface.register(IMPLEMENTATION, unpadded_attention)
        AttentionMaskInterface.register(IMPLEMENTATION, lambda *args, **kwargs: None)
        model.config.get_text_config()._attn_implementation = IMPLEMENTATION
        self.model, self.spec = model, spec
        layers = model.model.language_model.layers
        self.decoder = copy.deepcopy(layers[len(layers) // 2])
        self.projection = nn.Linear(spec.text_hidden, spec.group_size * spec.patch_values * spec.temporal_patch_size)
        nn.init.normal_(self.projection.weight, std=0.02)
        set_recompute(model, "full")

    def forward(self, documents: list[MaskedBatch]) -> dict[str, torch.Tensor]:
        spec, language, device = self.spec, self.model.model.language_model, self.model.device
        lengths = [len(document.stream.input_ids) for document in documents]
        ids, labels = (np.full((len(documents), max(lengths)), fill) for fill in (0, -100))
        places = np.zeros((3, *ids.shape), dtype=np.int64)
        for row, (document, length) in enumerate(zip(documents, lengths, strict=True)):
            stream = document.stream
            ids[row, :length], labels[row, :length] = stream.input_ids, document.labels
            places[:, row, :length] = position_ids(stream.input_ids, [length], stream.grid_thw, spec)[1:]
        ids, labels, places = (move(x, device) for x in (ids, labels, places))
        real = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
        attention = {
            "valid": real.flatten().nonzero().squeeze(1),
            "cu_seqlens": move(np.cumsum([0, *lengths], dtype=np.int32), device),
            "max_length": max(lengths),
            "attention_mask": None,
            "position_embeddings": language.rotary_emb(torch.empty(1, device=device, dtype=self.model.dtype), places),
        }
        states = language.embed_tokens(ids)
        masked, target, features = self._see(documents, device)
        is_image = ids == spec.image_token_id
        if features is not None:
            states = states.masked_scatter(is_image[..., None], features.to(states.dtype))
        for layer in language.layers:
            states = layer(states, **attention)
        states = language.norm(states)
        logits = self.model.lm_head(states).float()
        mlm = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
        decoded = self.decoder(states, **attention)
        masked_tokens = sum(int((document.labels >= 0).sum()) for document in documents)
        if features is None:
            return {"mlm": LossTerm(mlm, masked_tokens), "mae": LossTerm(0 * self.projection(decoded[:1, :1]).sum(), 0)}
        painted = self.projection(decoded[is_image][masked]).view(-1, target.shape[1])
        mae = (painted.float() - target).square().mean(1).sum()
        return {"mlm": LossTerm(mlm, masked_tokens), "mae": LossTerm(mae, len(painted))}

    def _see(self, documents, device):
        """(masked groups, the pixels behind them with both temporal copies, features), None for the last without an image."""
        streams = [
            to_device(document.stream, self.spec, device) for document in documents if len(document.stream.grid_thw)
        ]
        if not streams:
            return None, None, None
        pixels = torch.cat([stream.pixel_values for stream in streams])
        masked = move(np.concatenate([document.masked_groups for document in documents]), device)
        patches = masked.repeat_interleave(self.spec.group_size)
        seeds = np.concatenate([document.noise_seeds for document in documents])
        counts = np.array([document.masked_groups.sum() for document in documents]) * self.spec.group_size
        noised = pixels.clone()
        noised[patches] = unit_noise(seeds, counts, pixels)
        visual, grids = self.model.model.visual, torch.cat([stream.grid_thw for stream in streams]).to(device)
        return masked, pixels[patches], visual(noised.to(visual.dtype), grid_thw=grids).pooler_output


def unpadded_attention(module, query, key, value, mask, *, scaling, valid, cu_seqlens, max_length, **_):
    """Bidirectional attention of padded sequences [B, heads, L, head_dim] without their padding."""
    rows, _, longest, dim = query.shape
    flat = (x.transpose(1, 2).flatten(0, 1)[valid].transpose(0, 1)[None] for x in (query, key, value))
    lengths = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
    lengths |= {"max_length_q": max_length, "max_length_k": max_length}
    attended, _ = packed_attention(module, *flat, None, scaling=scaling, is_causal=False, **lengths)
    output = attended.new_zeros(rows * longest, query.shape[1], dim).index_copy(0, valid, attended[0])
    return output.view(rows, longest, query.shape[1], dim), None
