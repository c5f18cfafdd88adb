"""One process, plain torch: for tests, for tiny models and for measuring a single GPU. Needs torch and nothing else."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cluster.checkpoint import TORCH_FILE, read_manifest, write_manifest
from cluster.engine import EngineConfig, adamw, require_same_trained, set_lr, trained_parameters


class TorchEngine:
    """One process. "bf16" trains fp32 masters of bf16 weights, as DeepSpeed does.

    Every gradient joins the fp32 sum of its master as soon as autograd has it, and is freed: next to the masters and
    their sums there is never more than one bf16 gradient at a time. Buffers keep their precision.
    """

    def __init__(self, module: nn.Module, config: EngineConfig, device: torch.device | str = "cpu") -> None:
        self.rank, self.world_size = 0, 1
        self.device = torch.device(device)
        self.module = module.to(self.device).train()
        self._config = config
        self._trained = trained_parameters(module)
        self._hooks: list[Any] = []
        self._masters: dict[nn.Parameter, Tensor] = {}  # empty with fp32, where weights are their own masters
        if config.precision == "bf16":
            for parameter in self._trained.values():
                master = parameter.data.float()  # the very tensor that was loaded, if that was fp32
                self._masters[parameter] = master
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._move_gradient))
            for parameter in module.parameters():  # not the buffers: rotary frequencies need their fp32
                parameter.data = parameter.data.bfloat16()
        # On a GPU the default is many kernels with temporaries as large as the weights.
        self._optimizer = adamw(map(self._weight, self._trained.values()), config, fused=self.device.type == "cuda")
        self._complete = False  # the last backward of this step was seen

    def forward(self, batch: Any) -> Any:
        return self.module(batch)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        assert not self._complete, "backward() after the last one of this step"
        self._complete = last
        loss.backward()

    def step(self, lr: float) -> float:
        assert self._complete, "step() before the last backward()"
        self._complete = False
        self._fill_gradients()
        norm = nn.utils.clip_grad_norm_(self._weights(), self._config.max_grad_norm or math.inf).item()
        if math.isfinite(norm):
            set_lr(self._optimizer, lr)
            self._optimizer.step()
            self._copy_masters()
        self._optimizer.zero_grad(set_to_none=True)
        return norm if math.isfinite(norm) else math.inf

    def weights(self) -> dict[str, Tensor]:
        if self.rank != 0:
            return {}
        return {name: self._weight(p).detach().float().cpu().clone() for name, p in self._trained.items()}

    def save(self, directory: str, state: dict[str, Any]) -> None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        module = {name: self._weight(tensor).detach() for name, tensor in self._saved().items()}
        torch.save({"module": module, "optimizer": self._optimizer.state_dict()}, Path(directory, TORCH_FILE))
        write_manifest(directory, {"kind": "torch", "trained": list(self._trained), "state": state})

    def load(self, directory: str) -> dict[str, Any]:
        manifest = read_manifest(directory, kind="torch")
        require_same_trained(directory, manifest["trained"], self._trained)
        whole = torch.load(Path(directory, TORCH_FILE), map_location="cpu", weights_only=True)
        for name, tensor in self._saved().items():
            self._weight(tensor).data.copy_(whole["module"][name])
        self._copy_masters()
        for saved, group in zip(whole["optimizer"]["param_groups"], self._optimizer.param_groups, strict=True):
            saved["fused"] = group["fused"]  # a matter of the device, not of the run
        self._optimizer.load_state_dict(whole["optimizer"])
        return manifest["state"]

    def close(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        for hook in self._hooks:
            hook.remove()

    def _weights(self) -> list[Tensor]:
        """What the optimizer updates."""
        return [weight for group in self._optimizer.param_groups for weight in group["params"]]

    def _fill_gradients(self) -> None:
        """What no loss depends on has a gradient of zero: ZeRO sees it so, and decays the weight."""
        for weight in self._weights():
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)

    def _weight(self, tensor: Tensor) -> Tensor:
        """The master of a parameter that has one; every other tensor is what it is."""
        return self._masters.get(tensor, tensor)

    def _move_gradient(self, parameter: Tensor) -> None:
        master = self._masters[parameter]
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad.add_(parameter.grad)
        parameter.grad = None

    @torch.no_grad()
    def _copy_masters(self) -> None:
        for parameter, master in self._masters.items():
            parameter.copy_(master)

    def _saved(self) -> dict[str, Tensor]:
        """What belongs in a checkpoint, by every name it has: trained parameters and buffers."""
        whole = self.module.state_dict(keep_vars=True)
        return {name: t for name, t in whole.items() if not isinstance(t, nn.Parameter) or t.requires_grad}
