"""Activation checkpointing: the same gradients, paid for with products or with memory."""

import pytest
import torch
from samples import CONTENTS, row_of
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from moca_core.attention import set_attention
from moca_core.backbone import load_backbone
from moca_core.data.masking import mask
from moca_core.data.render import Renderer
from moca_core.objective.pretraining import MaskedModelling
from moca_core.recompute import set_recompute
from moca_core.spec import read_spec


class Alive(TorchDispatchMode):
    """Remembers the storage of everything that is computed, without keeping it alive; views of the weights are no news."""

    def __init__(self, module):
        super().__init__()
        self.weights = {p.untyped_storage()._cdata for p in module.parameters()}
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.weights:
                    self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return output

    def bytes(self):
        return sum(size for reference, size in self.storages.values() if not reference.expired())


def step(folder, tokenizer, kind):
    """(gradients, bytes kept by the forward pass, FLOPs of matrix products)."""
    spec = read_spec(folder)
    batch = mask(row_of(CONTENTS, Renderer(tokenizer, spec, 256)), spec, seed=0, epoch=0, mlm_ratio=0.4, mae_ratio=0.5)
    model = load_backbone(folder)
    set_attention(model, "bidirectional")
    set_recompute(model, kind)
    torch.manual_seed(0)
    module = MaskedModelling(model, spec).train()
    alive, counter = Alive(module), FlopCounterMode(display=False)
    with counter:
        with alive:
            terms = module(batch)
        kept = alive.bytes()
        (terms["mlm"].sum + terms["mae"].sum).backward()
    return {n: p.grad for n, p in module.named_parameters()}, kept, counter.get_total_flops()


def test_gradients_stay_and_work_or_memory_changes(any_folder, tokenizer):
    found = {kind: step(any_folder, tokenizer, kind) for kind in ("none", "selective", "full")}
    for kind in ("selective", "full"):
        for name, grad in found[kind][0].items():
            torch.testing.assert_close(grad, found["none"][0][name], atol=1e-6, rtol=1e-5, msg=f"{kind} {name}")
    work = {kind: flops for kind, (_, _, flops) in found.items()}
    assert work["selective"] == work["none"]
    assert 1.05 * work["none"] < work["full"] < 4 / 3 * work["none"]
    memory = {kind: kept for kind, (_, kept, _) in found.items()}
    assert memory["full"] < memory["selective"] < memory["none"], memory


@pytest.mark.gpu
def test_the_flash_kernel_is_among_what_is_kept():
    import torch.nn.attention.varlen

    from moca_core.recompute import _DEAR_NAMES

    assert all(hasattr(getattr(torch.ops, n.split("::")[0]), n.split("::")[1]) for n in _DEAR_NAMES)
