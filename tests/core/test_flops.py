"""FLOPs against a closed form, and against a counter that watches the matrix products of a real step."""

from dataclasses import replace
from itertools import pairwise

import pytest
from samples import CONTENTS, row_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moca_core.attention import set_attention
from moca_core.backbone import load_backbone
from moca_core.data.masking import mask
from moca_core.data.pairs import collate_pairs
from moca_core.data.render import Renderer
from moca_core.flops import language_flops, mae_flops, vision_flops
from moca_core.objective.contrastive import Contrastive
from moca_core.objective.pretraining import MaskedModelling
from moca_core.spec import read_spec
from moca_core.types import Pair


def test_a_tiny_case_by_hand(spec):
    tiny = replace(
        spec, text_hidden=2, text_layers=3, text_width=4, text_kv_width=1, text_intermediate=5, vision_hidden=7,
        vision_layers=11, vision_params_per_layer=13, vision_full_layers=2, vision_window_px=56, merger_params=17,
    )  # fmt: skip
    per_layer = 2 * (2 * 4 + 2 * 1 + 3 * 5)
    assert language_flops(tiny, [4, 6]) == (2 * 10 * 3 * per_layer, 4 * 3 * 4 * (4**2 + 6**2), 0)
    # images of 4 x 6 and 2 x 2 patches; windows of 4 x 4 patches cut the first into 4 x 4 and 4 x 2
    linear, embedding = 2 * (28 * 11 * 13 + 7 * 17), 2 * 28 * 7 * 3 * 14 * 14 * 2
    pairs = 2 * (24**2 + 4**2) + 9 * (16**2 + 8**2 + 4**2)
    assert vision_flops(tiny, [(1, 4, 6), (1, 2, 2)]) == (linear, 4 * 7 * pairs, embedding)
    # keys and values of 9 tokens, the rest of the layer and the projection for 5
    assert mae_flops(tiny, [9], [5], 1) == (
        2 * (9 * 2 * 2 * 1 + 5 * (per_layer - 2 * 2 * 1) + 5 * 2 * 4 * 3 * 14 * 14),
        4 * 4 * 9 * 5,
        0,
    )


def test_backward_is_counted_where_there_is_one(spec):
    forward = language_flops(spec, [100])
    assert forward.trained() == 3 * sum(forward)
    assert forward.trained(weights=0, inputs=False) == sum(forward)
    images = vision_flops(spec, [(1, 8, 8)])
    assert images.trained() == 3 * (images.linear + images.attention) + 2 * images.pixels
    assert forward.trained(weights=0) == 2 * forward.linear + 3 * forward.attention


def prepared(folder, frozen=()):
    model = load_backbone(folder)
    set_attention(model, "bidirectional")
    for part in frozen:
        model.get_submodule(part).requires_grad_(False)
    return model


def counted(module, batch, loss):
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:  # which is made of products that the counter sees
        loss(module(batch)).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("frozen", [(), ("model.visual",), ("model.language_model",)], ids=str)
def test_pretraining_flops_are_those_that_a_counter_sees(any_folder, tokenizer, frozen):
    spec = read_spec(any_folder)
    renderer = Renderer(tokenizer, spec, 256)
    batch = mask(row_of(CONTENTS, renderer), spec, seed=0, epoch=0, mlm_ratio=0.4, mae_ratio=0.5)
    module = MaskedModelling(prepared(any_folder, frozen), spec, decoder_layers=2)
    seen = counted(module, batch, lambda terms: sum(module.weights[n] * t.sum for n, t in terms.items()))
    assert module.flops(batch) == pytest.approx(seen, rel=0.02)


def test_contrastive_flops_are_those_that_a_counter_sees(any_folder, tokenizer):
    spec = read_spec(any_folder)
    pairs = [Pair("t", content, (answer,)) for content, answer in pairwise(CONTENTS)]
    batch = collate_pairs(pairs, Renderer(tokenizer, spec, 256), num_negatives=0, sources=["t"], key=(0,))
    module = Contrastive(prepared(any_folder), spec)
    seen = counted(module, batch, lambda terms: terms["contrastive"].sum)
    assert module.flops(batch) == pytest.approx(seen, rel=0.02)
