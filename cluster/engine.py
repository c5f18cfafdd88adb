"""What training asks of an engine: the contract that TorchEngine and DeepSpeedEngine keep, and what both share.

After the micro-batches of a step, the optimizer sees the SUM, over ranks and micro-batches, of the gradients of the
losses given to `backward`. A loss is therefore this rank's sum over its rows divided by the count over all ranks and
micro-batches; how rows fall on ranks and micro-batches never changes an update. A step whose gradient is not finite
leaves the weights alone. The module is in training mode, and what of it does not require grad when an engine gets it
stays as it is and is left out of checkpoints: who resumes brings the same frozen weights again.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from cluster.zero import ZeroConfig


@dataclass(frozen=True)
class EngineConfig(ZeroConfig):
    """How to optimize: AdamW, whose weight decay leaves parameters of one dimension (norms, biases) alone.

    precision: "fp32", or "bf16" weights and activations under fp32 master weights. Gradients are summed in fp32 over
    micro-batches and over ranks; with DeepSpeed, what a rank brings to an exchange is rounded to bf16 at stages 1 and 2,
    and at stage 1 the sum as well. max_grad_norm: clip the global gradient to this norm, 0 for never. TorchEngine, one process,
    reads nothing of ZeroConfig.
    """

    precision: Literal["fp32", "bf16"] = "fp32"
    max_grad_norm: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "betas", tuple(self.betas))  # a YAML file brings a list
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision {self.precision!r} must be 'fp32' or 'bf16'")
        for name in ("max_grad_norm", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)} must be 0 (off) or a positive number")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas} must be two numbers in [0, 1)")
        if not self.eps > 0:
            raise ValueError(f"eps {self.eps} must be positive")


class Engine(Protocol):
    """A module in training. Every method is collective: all ranks call it, in the same order."""

    rank: int
    world_size: int
    device: torch.device
    module: nn.Module

    def forward(self, batch: Any) -> Any:
        """The module's output for one micro-batch; may be called several times before `backward`, or under no_grad."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of a scalar loss. `last` on the last call of a step.

        Steps may have any number of calls, each another one; it is the same on all ranks.
        """

    def step(self, lr: float) -> float:
        """Update with learning rate `lr` and clear the gradients. Returns the global gradient norm before clipping.

        If that is not finite (inf is returned then), nothing was updated.
        """

    def weights(self) -> dict[str, Tensor]:
        """The trained weights as they are now, by name, tied ones once: fp32, on the CPU. Empty on all ranks but 0."""

    def save(self, directory: str, state: dict[str, Any]) -> None:
        """Write trained weights, optimizer and `state` (small, JSON-able).

        `directory` is one for all ranks, or one per rank, to be merged before `load`.
        """

    def load(self, directory: str) -> dict[str, Any]:
        """Take up what `save` wrote, all ranks' files merged; returns its `state`.

        The number of ranks may differ from those that saved. ValueError if it is not complete, from the other kind of
        engine (stage 0, stages 1 and 2, stage 3), or of other trained weights.
        """

    def close(self) -> None:
        """Let go of hooks and buffers; the process group stays."""


def open_engine(module: nn.Module, config: EngineConfig) -> Engine:
    """The engine for all ranks of this process's torch.distributed group at `config.zero_stage`."""
    if config.zero_stage == 0:
        from cluster.data_parallel import DataParallelEngine

        return DataParallelEngine(module, config)
    from cluster.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(module, config)


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """What an engine trains, by name, tied parameters once. ValueError if that is nothing."""
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not trained:
        raise ValueError(f"{type(module).__name__} has no parameter with requires_grad: nothing to train")
    return trained


def adamw(weights: Iterable[Tensor], config: EngineConfig, *, fused: bool | None = None) -> torch.optim.AdamW:
    """AdamW over `weights`. `fused`: one kernel in place of many small ones."""
    return torch.optim.AdamW(decay_groups(weights, config), lr=0.0, betas=config.betas, eps=config.eps, fused=fused)


def decay_groups(weights: Iterable[Tensor], config: EngineConfig) -> list[dict[str, Any]]:
    """Matrices with weight decay, vectors and scalars without."""
    weights = list(weights)
    matrices = {"params": [w for w in weights if w.dim() > 1], "weight_decay": config.weight_decay}
    vectors = {"params": [w for w in weights if w.dim() <= 1], "weight_decay": 0.0}
    return [group for group in (matrices, vectors) if group["params"]]  # ZeRO refuses empty groups


def set_lr(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def require_same_trained(directory: str, saved: Iterable[str], trained: Iterable[str]) -> None:
    """ValueError if a checkpoint is not of exactly these trained weights: what it lacks would silently stay as it was."""
    lacks, extra = sorted(set(trained) - set(saved)), sorted(set(saved) - set(trained))
    if lacks or extra:
        raise ValueError(
            f"{directory} is of other trained weights: it lacks {lacks[:5]}, and what it has of {extra[:5]} is not "
            "trained here; resume with the same parts frozen, or start anew"
        )
