"""The flash kernel on a CUDA device against the plain path on the CPU. Written for a GPU; skipped where there is none."""

import pytest
import torch
from samples import image, stream_of, text

from moca_core.attention import set_attention
from moca_core.backbone import load_backbone
from moca_core.model.encoder import Encoder
from moca_core.model.inputs import to_device

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CONTENTS = [
    (text("a few words"),),
    (image(60, 40), text("below the picture")),
    (text("the last of them"), image(84, 84, 1)),
]


def encoder(folder, spec, device, dtype, bidirectional=True):
    model = load_backbone(folder, dtype).to(device)
    if bidirectional:
        set_attention(model, "bidirectional")
    return Encoder(model.model, spec)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_flash_agrees_with_the_plain_path(folder, spec, renderer, bidirectional):
    stream = stream_of(CONTENTS, renderer)
    reference = encoder(folder, spec, "cpu", torch.float32, bidirectional)(to_device(stream, spec, torch.device("cpu")))
    flash = encoder(folder, spec, "cuda", torch.bfloat16, bidirectional)(to_device(stream, spec, torch.device("cuda")))
    assert torch.cosine_similarity(flash.float().cpu(), reference, dim=1).min() > 0.98


def test_neighbours_stay_apart_and_gradients_reach_both_towers(folder, spec, renderer):
    device = torch.device("cuda")
    model = encoder(folder, spec, device, torch.bfloat16)
    alone, packed = (to_device(stream_of(c, renderer), spec, device) for c in (CONTENTS[1:2], CONTENTS))
    start, end = packed.cu_seqlens[1:3].tolist()
    states = model(packed)
    assert torch.cosine_similarity(states[start:end].float(), model(alone).float(), dim=1).min() > 0.99
    states[start:end].float().square().sum().backward()
    for tower in (model.backbone.visual, model.backbone.language_model):
        assert all(torch.isfinite(p.grad).all() for p in tower.parameters() if p.grad is not None)
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in tower.parameters())
