"""A tiny model as the export step leaves it, for tests of those who use one."""

import torch

from moca_core.attention import set_attention
from moca_core.backbone import load_backbone, save_backbone
from moca_core.export import export_model
from moca_core.folder import copy_processor
from moca_core.spec import read_spec
from tests.tiny import tiny_model


def exported_model(folder, family="qwen2_5_vl", max_tokens=256):
    """The path of a bidirectional model of random weights below `folder`."""
    base, trained, out = (folder / name for name in ("base", "trained", "model"))
    base.mkdir(parents=True)
    tiny_model(str(base), family)
    model = load_backbone(str(base))
    set_attention(model, "bidirectional")
    save_backbone(model, str(trained))
    copy_processor(str(base), str(trained))
    export_model(str(trained), str(out), read_spec(str(trained)), max_tokens=max_tokens, dtype=torch.float32)
    return str(out)
