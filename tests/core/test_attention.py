"""Who sees whom: both directions after conversion, never across a border of the pack; equal to plain transformers."""

import inspect
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.attention.varlen
from samples import CONTENTS, parts, plain_inputs, plain_model, row_of, stream_of, text, words
from transformers import AutoModel

from moca_core import attention
from moca_core.attention import IMPLEMENTATION, packed_attention, set_attention
from moca_core.backbone import load_backbone, save_backbone
from moca_core.data.masking import packed_stream
from moca_core.data.render import Renderer
from moca_core.model.encoder import Encoder, mean_pool
from moca_core.model.inputs import to_device
from moca_core.spec import read_spec

CPU = torch.device("cpu")


def encoder(folder, causal):
    model = load_backbone(folder).eval()
    if not causal:
        set_attention(model, "bidirectional")
    return Encoder(model.model, read_spec(folder))


@torch.no_grad()
def packed_states(folder, stream, causal):
    enc = encoder(folder, causal)
    return enc(to_device(stream, enc.spec, CPU))


def changed_last(ids):
    other = ids.clone()
    other[0, -1] = other[0, -1] % 50 + 60
    return other


@torch.no_grad()
def first_moves(model, ids):
    """How far the first hidden state moves when only the last token changes."""
    states = [model(input_ids=i, use_cache=False).last_hidden_state[0, 0] for i in (ids, changed_last(ids))]
    return (states[0] - states[1]).abs().max().item()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_last_token_moves_the_first_state_only_after_conversion(any_folder, implementation, padded):
    model = AutoModel.from_pretrained(any_folder, attn_implementation=implementation).eval()
    ids = torch.arange(20, 32)[None]
    mask = torch.ones(2, 16, dtype=torch.long) if padded else None

    def moves():
        if not padded:
            return first_moves(model, ids)
        mask[0, 12:] = 0
        batches = [
            torch.stack([torch.nn.functional.pad(i[0], (0, 4)), torch.arange(40, 56)]) for i in (ids, changed_last(ids))
        ]
        with torch.no_grad():
            states = [model(input_ids=b, attention_mask=mask, use_cache=False).last_hidden_state[0, 0] for b in batches]
        return (states[0] - states[1]).abs().max().item()

    assert moves() == 0
    set_attention(model, "bidirectional")
    assert moves() > 1e-3


def test_last_token_moves_the_first_state_only_after_conversion_in_a_pack(any_folder, renderer):
    row = row_of([(text(words(12)),)], renderer)
    other = dict(row, input_ids=changed_last(torch.tensor(row["input_ids"])[None])[0].numpy())
    for causal in (True, False):
        states = [packed_states(any_folder, packed_stream(r, renderer.spec), causal)[0] for r in (row, other)]
        assert torch.equal(*states) == causal
        if not causal:
            assert (states[0] - states[1]).abs().max() > 1e-3


def test_conversion_survives_saving_and_loading(folder, tmp_path):
    model = load_backbone(folder)
    set_attention(model, "bidirectional")
    save_backbone(model, str(tmp_path))
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert again.config._attn_implementation != IMPLEMENTATION
    assert first_moves(again, torch.arange(20, 32)[None]) > 1e-3


@pytest.mark.parametrize("causal", [True, False])
def test_neighbours_in_a_pack_do_not_move_each_other(any_folder, tokenizer, causal):
    renderer = Renderer(tokenizer, read_spec(any_folder), 256)
    neighbours = (CONTENTS[3], (text(words(9, 50)),), CONTENTS[1])
    middle = CONTENTS[2]
    kept = []
    for before, after in ((CONTENTS[3], CONTENTS[0]), neighbours[:2], neighbours[1:]):
        stream = stream_of((before, middle, after), renderer)
        kept.append(parts(packed_states(any_folder, stream, causal), np.diff(stream.cu_seqlens))[1])
    alone = packed_states(any_folder, stream_of((middle,), renderer), causal)
    for states in kept:
        torch.testing.assert_close(states, alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_packed_forward_is_the_plain_forward_of_every_document(any_folder, tokenizer, causal):
    spec = read_spec(any_folder)
    renderer = Renderer(tokenizer, spec, 256)
    stream = stream_of(CONTENTS, renderer)
    packed = parts(packed_states(any_folder, stream, causal), np.diff(stream.cu_seqlens))
    model = plain_model(any_folder, causal)
    wrong = plain_model(any_folder, not causal)
    for states, content in zip(packed, CONTENTS, strict=True):
        inputs = plain_inputs(renderer.first(content), any_folder, spec)
        expected = model(**inputs, use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)
        if len(states) > 3:  # the comparison tells causal and bidirectional apart
            assert (wrong(**inputs, use_cache=False).last_hidden_state[0] - states).abs().max() > 1e-3


@pytest.mark.parametrize("causal", [True, False])
def test_packed_attention_is_softmax_over_the_own_sequence(causal):
    """Against the written-out definition, with shared key heads and sequences of equal and of single length."""
    lengths, heads, kv_heads, dim = [5, 1, 5, 3], 4, 2, 8
    total = sum(lengths)
    torch.manual_seed(0)
    q, k, v = torch.randn(1, heads, total, dim), *torch.randn(2, 1, kv_heads, total, dim)
    cu = torch.tensor([0, 5, 6, 11, 14], dtype=torch.int32)
    out, _ = packed_attention(None, q, k, v, None, scaling=0.3, is_causal=causal, **lengths_of(cu, cu))
    for start, end in pairwise(cu.tolist()):
        for t in range(start, end):
            for h in range(heads):
                seen = slice(start, t + 1 if causal else end)
                weights = (0.3 * k[0, h // 2, seen] @ q[0, h, t]).softmax(0)
                torch.testing.assert_close(out[0, t, h], weights @ v[0, h // 2, seen])


def test_fewer_queries_than_keys_are_the_same_rows_of_all_queries():
    """What the MAE decoder asks for: some queries of every sequence, also none of one."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 14, 8)
    cu = torch.tensor([0, 5, 6, 11, 14], dtype=torch.int32)
    rows, cu_q = torch.tensor([1, 3, 4, 6, 11, 13]), torch.tensor([0, 3, 3, 4, 6], dtype=torch.int32)
    whole, _ = packed_attention(None, q, k, v, None, scaling=0.3, is_causal=False, **lengths_of(cu, cu))
    some, _ = packed_attention(None, q[:, :, rows], k, v, None, scaling=0.3, is_causal=False, **lengths_of(cu_q, cu))
    torch.testing.assert_close(some, whole[:, rows])


@pytest.mark.parametrize("causal", [True, False])
def test_the_flash_kernel_is_asked_for_what_the_reference_does(monkeypatch, causal):
    """Its call on CUDA, held to the kernel's own signature and answered in plain torch."""
    real = inspect.signature(torch.nn.attention.varlen.varlen_attn)

    def kernel(*args, **kwargs):
        given = real.bind(*args, **kwargs).arguments
        assert given["window_size"] == ((-1, 0) if causal else (-1, -1))
        q, k, v, cu_q, cu_k = (given[n] for n in ("query", "key", "value", "cu_seq_q", "cu_seq_k"))
        assert cu_q.dtype == cu_k.dtype == torch.int32 and q.is_contiguous()
        assert q.shape[1] == k.shape[1] or given["enable_gqa"]
        assert (given["max_q"], given["max_k"]) == (cu_q.diff().max(), cu_k.diff().max())
        rows = []
        for (q_start, q_end), (k_start, k_end) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
            parts = q[q_start:q_end], k[k_start:k_end], v[k_start:k_end]
            heads = (x.transpose(0, 1)[None] for x in parts)
            rows.append(
                torch.nn.functional.scaled_dot_product_attention(
                    *heads, scale=given["scale"], is_causal=causal, enable_gqa=True
                )[0].transpose(0, 1)
            )
        return torch.cat(rows)

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "_use_fastest_kernel", lambda: None)
    q, k, v = torch.randn(14, 4, 8), *torch.randn(2, 14, 2, 8)
    cu = torch.tensor([0, 5, 6, 11, 14], dtype=torch.int32)
    found = attention._flash(q, k, v, cu, cu, 5, 5, 0.3, causal)
    torch.testing.assert_close(found, attention._by_length(q, k, v, cu, cu, 0.3, causal))


@pytest.mark.parametrize(
    ("major", "installed", "active"),
    [
        (9, "flash_attn_interface", "FA3"),
        (10, "flash_attn.cute", "FA4"),
        (9, None, None),
        (8, "flash_attn_interface", None),
    ],
)
def test_a_faster_kernel_is_used_where_it_is_installed(monkeypatch, major, installed, active):
    activated = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))
    monkeypatch.setattr(attention, "find_spec", lambda package: package if package == installed else None)
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activated.append)
    attention._use_fastest_kernel.__wrapped__()
    assert activated == ([active] if active else [])


def lengths_of(cu_q, cu_k):
    longest = {f"max_length_{name}": int(cu.diff().max()) for name, cu in (("q", cu_q), ("k", cu_k))}
    return {"cu_seq_lens_q": cu_q, "cu_seq_lens_k": cu_k, **longest}


def test_mean_pool_is_the_mean_of_every_sequence():
    states = torch.randn(7, 4)
    pooled = mean_pool(states.bfloat16(), torch.tensor([2, 1, 4]))
    assert pooled.dtype == torch.float32
    expected = torch.stack([part.mean(0) for part in states.bfloat16().float().split([2, 1, 4])])
    torch.testing.assert_close(pooled, expected)
