"""The one place that makes attention bidirectional and keeps packed sequences apart.

`config.text_config.is_causal = False` is the only switch that every attention implementation of transformers obeys, and it
survives saving and loading. Packing needs more: with eager and sdpa the bidirectional mask forgets where sequences end. So
the model gets one attention function that reads `cu_seqlens`: the flash kernel that ships with torch where it runs (CUDA,
16 bit), SDPA over sequences of equal length elsewhere. Both towers use it.
"""

from functools import cache
from importlib.util import find_spec
from inspect import signature

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from moca_core.types import Attention

IMPLEMENTATION = "moca_flash_varlen"  # transformers hands cu_seqlens to the vision tower only if "flash" is in the name


def set_attention(model: PreTrainedModel, kind: Attention) -> None:
    """Which tokens of its sequence a token sees from now on, also after saving and loading with transformers."""
    model.config.get_text_config().is_causal = kind == "causal"
    model.config.is_causal = kind == "causal"  # serving engines read the top level


def attention_of(model: PreTrainedModel) -> Attention:
    """What the model's config declares."""
    return declared_attention(model.config)


def declared_attention(config: PreTrainedConfig) -> Attention:
    """One that says nothing is of an ordinary causal model."""
    return "causal" if getattr(config.get_text_config(), "is_causal", True) else "bidirectional"


def use_packed_attention(model: PreTrainedModel) -> None:
    """Makes the model's forward take packed sequences by `cu_seq_lens_q` and `max_length_q`. Not written to its saved config."""
    AttentionInterface.register(IMPLEMENTATION, torch.compiler.disable(packed_attention))
    AttentionMaskInterface.register(IMPLEMENTATION, lambda *args, **kwargs: None)
    for config in (model.config, model.config.get_text_config(), model.config.vision_config):
        config._attn_implementation = IMPLEMENTATION


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    cu_seq_lens_q: torch.Tensor,
    cu_seq_lens_k: torch.Tensor,
    max_length_q: int,
    max_length_k: int,
    is_causal: bool | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attention within each sequence of a packed stream: q, k, v [1, heads, T, head_dim] to [1, T, heads, head_dim].

    Queries may be fewer than keys, in as many sequences; causal attention wants them equal.
    """
    causal = module.is_causal if is_causal is None else is_causal
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, head_dim]
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        lengths = cu_seq_lens_q, cu_seq_lens_k, int(max_length_q), int(max_length_k)
        return _flash(q, k, v, *lengths, scaling, causal)[None], None
    return _by_length(q, k, v, cu_seq_lens_q, cu_seq_lens_k, scaling, causal)[None], None


def _flash(q, k, v, cu_q, cu_k, max_q: int, max_k: int, scaling: float, causal: bool) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    _use_fastest_kernel()
    grouped = {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in signature(varlen_attn).parameters:
            grouped = {"enable_gqa": True}
        else:  # torch before 2.12: the kernel wants as many key heads as query heads
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    window = (-1, 0) if causal else (-1, -1)
    q, k, v = (x.contiguous() for x in (q, k, v))
    cu_q, cu_k = cu_q.to(torch.int32), cu_k.to(torch.int32)
    return varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale=scaling, window_size=window, **grouped)


@cache
def _use_fastest_kernel() -> None:
    """Lets torch's varlen attention run on FlashAttention 3 (Hopper) or 4 (Blackwell) where that package is installed."""
    major, _ = torch.cuda.get_device_capability()
    name, package = {9: ("FA3", "flash_attn_interface"), 10: ("FA4", "flash_attn.cute")}.get(major, ("", ""))
    if name and _is_installed(package):
        torch.nn.attention.activate_flash_attention_impl(name)


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def _by_length(q, k, v, cu_q, cu_k, scaling: float, causal: bool) -> torch.Tensor:
    """One SDPA call per distinct length: windows and images of a size go together, sequences of their own length alone."""
    lengths = torch.stack([cu_q.diff(), cu_k.diff()], dim=1)
    assert not causal or torch.equal(cu_q, cu_k), "causal attention needs a key for every query"
    indices, outputs = [], []
    for shape in lengths.unique(dim=0):
        here = (lengths == shape).all(dim=1)
        if shape[0] == 0:
            continue
        in_q, in_k = (
            starts[:-1][here, None] + torch.arange(int(length), device=q.device)
            for starts, length in ((cu_q, shape[0]), (cu_k, shape[1]))
        )  # [n, length]
        batch = [
            x[index].transpose(1, 2) for x, index in ((q, in_q), (k, in_k), (v, in_k))
        ]  # [n, heads, length, head_dim]
        attended = scaled_dot_product_attention(*batch, scale=scaling, is_causal=causal, enable_gqa=True)
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
        indices.append(in_q.flatten())
    return torch.cat(outputs)[torch.argsort(torch.cat(indices))]
