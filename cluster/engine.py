"""Training engines: the same step on one process (TorchEngine) or on many with DeepSpeed ZeRO (DeepSpeedEngine).

The contract of both: after the micro-batches of a step, the optimizer sees the SUM, over ranks and micro-batches, of
the gradients of the losses given to `backward`. A loss is therefore this rank's sum over its rows divided by the
count over all ranks and micro-batches; how rows fall on ranks and micro-batches never changes an update. A step whose
gradient is not finite leaves the weights alone.
"""

import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from cluster.checkpoint import MANIFEST, TORCH_FILE, ZERO_TAG, read_manifest, reshard_zero, write_manifest

_CONSTANTS = ("weight_decay", "betas", "eps")


@dataclass(frozen=True)
class EngineConfig:
    """How to optimize: AdamW, whose weight decay leaves parameters of one dimension (norms, biases) alone.

    precision: "fp32", or "bf16" weights and activations (with DeepSpeed: fp32 master weights; gradients are summed in
    fp32 over ranks, and over micro-batches too at stages 2 and 3). max_grad_norm: clip the global gradient to this
    norm, 0 for never.
    """

    precision: Literal["fp32", "bf16"] = "fp32"
    zero_stage: Literal[1, 2, 3] = 2
    micro_batches_per_step: int = 1
    max_grad_norm: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))  # a YAML file brings a list
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision {self.precision!r} must be 'fp32' or 'bf16'")
        if self.zero_stage not in (1, 2, 3):
            raise ValueError(f"zero_stage {self.zero_stage!r} must be 1, 2 or 3")
        if self.micro_batches_per_step < 1:
            raise ValueError(f"micro_batches_per_step {self.micro_batches_per_step} must be at least 1")
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

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar loss; exactly `micro_batches_per_step` calls belong to one `step`."""

    def step(self, lr: float) -> float:
        """Update with learning rate `lr` and clear the gradients. Returns the global gradient norm before clipping.

        If that is not finite (inf is returned then), nothing was updated.
        """

    def save(self, directory: str, state: dict[str, Any]) -> None:
        """Write weights, optimizer and `state` (small, JSON-able).

        `directory` is one for all ranks, or one per rank, to be merged before `load`.
        """

    def load(self, directory: str) -> dict[str, Any]:
        """Take up what `save` wrote, all ranks' files merged; returns its `state`.

        With DeepSpeed the number of ranks may differ from those that saved. ValueError if it is not complete, from
        the other kind of engine, or from stage 3 for stage 1 or 2 (and the other way round).
        """

    def close(self) -> None:
        """Let go of hooks and buffers; the process group stays."""


class TorchEngine:
    """One process, plain torch; "bf16" keeps weights and optimizer in bf16, without fp32 masters."""

    def __init__(self, module: nn.Module, config: EngineConfig, device: torch.device | str = "cpu") -> None:
        self.rank, self.world_size = 0, 1
        self.device = torch.device(device)
        self.module = module.to(self.device)
        if config.precision == "bf16":
            for parameter in module.parameters():  # not the buffers: rotary frequencies need their fp32
                parameter.data = parameter.data.bfloat16()
        self._config = config
        self._optimizer = _adamw(module, config)
        self._waiting = config.micro_batches_per_step

    def forward(self, batch: Any) -> Any:
        return self.module(batch)

    def backward(self, loss: Tensor) -> None:
        self._waiting = _count_down(self._waiting)
        loss.backward()

    def step(self, lr: float) -> float:
        assert self._waiting == 0, f"step() came {self._waiting} micro-batches too early"
        self._waiting = self._config.micro_batches_per_step
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            if parameter.grad is None:  # ZeRO sees a zero there, and decays the weight
                parameter.grad = torch.zeros_like(parameter)
        limit = self._config.max_grad_norm or math.inf
        norm = nn.utils.clip_grad_norm_(parameters, limit).item()
        if math.isfinite(norm):
            _set_lr(self._optimizer, lr)
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm if math.isfinite(norm) else math.inf

    def save(self, directory: str, state: dict[str, Any]) -> None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        whole = {"module": self.module.state_dict(), "optimizer": self._optimizer.state_dict()}
        torch.save(whole, Path(directory, TORCH_FILE))
        write_manifest(directory, {"kind": "torch", "state": state})

    def load(self, directory: str) -> dict[str, Any]:
        manifest = read_manifest(directory, kind="torch")
        whole = torch.load(Path(directory, TORCH_FILE), map_location=self.device, weights_only=True)
        self.module.load_state_dict(whole["module"])
        self._optimizer.load_state_dict(whole["optimizer"])
        return manifest["state"]

    def close(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)


class DeepSpeedEngine:
    """ZeRO 1, 2 or 3 on this process's torch.distributed group: CPU if its backend is gloo, CUDA if it is nccl."""

    def __init__(self, module: nn.Module, config: EngineConfig) -> None:
        if not torch.distributed.is_initialized():
            raise ValueError(
                "DeepSpeedEngine needs a torch.distributed group (run_workers makes one); without: TorchEngine"
            )
        on_cpu = torch.distributed.get_backend() != "nccl"
        if on_cpu:
            os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is first imported
        import deepspeed

        if on_cpu:
            disable_shm_op()
        deepspeed.init_distributed(dist_backend="gloo" if on_cpu else "nccl", auto_mpi_discovery=False, verbose=False)
        optimizer = _adamw(module, config)
        size = sum(parameter.numel() for parameter in module.parameters())
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=zero_config(config, size), dist_init_required=False
        )
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.device = torch.device(self._engine.device)
        self.module = module
        self._config = config
        self._waiting = config.micro_batches_per_step

    def forward(self, batch: Any) -> Any:
        return self._engine(batch)

    def backward(self, loss: Tensor) -> None:
        self._waiting = _count_down(self._waiting)
        # DeepSpeed averages over ranks and micro-batches; we sum.
        self._engine.backward(loss * self.world_size, scale_wrt_gas=False)
        if self._waiting:
            self._engine.step()  # before the last micro-batch this only counts

    def step(self, lr: float) -> float:
        assert self._waiting == 0, f"step() came {self._waiting} micro-batches too early"
        self._waiting = self._config.micro_batches_per_step
        _set_lr(self._optimizer, lr)
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        assert norm is not None, "DeepSpeed did not compute a gradient norm"
        return float(norm)

    def save(self, directory: str, state: dict[str, Any]) -> None:
        json.dumps(state)  # fails here on every rank, not on rank 0 alone after the shards
        self._engine.save_checkpoint(directory, tag=ZERO_TAG)
        if self.rank == 0:
            facts = {"kind": "zero", "world_size": self.world_size, "zero_stage": self._config.zero_stage}
            write_manifest(directory, {**facts, "state": state})
        torch.distributed.barrier()  # whoever returns may rely on the manifest

    def load(self, directory: str) -> dict[str, Any]:
        manifest = read_manifest(directory, kind="zero")
        saved, mine = manifest["zero_stage"], self._config.zero_stage
        if (saved == 3) != (mine == 3):
            raise ValueError(
                f"{directory} is of ZeRO stage {saved} and cannot continue at {mine}: set zero_stage={saved}"
            )
        same_shape = (manifest["world_size"], saved) == (self.world_size, mine)
        source = directory if same_shape else reshard_zero(directory)
        constants = [{key: group[key] for key in _CONSTANTS} for group in self._optimizer.param_groups]
        self._engine._config.load_universal_checkpoint = not same_shape
        path, _ = self._engine.load_checkpoint(source, tag=ZERO_TAG)
        self._engine._config.load_universal_checkpoint = False
        # DeepSpeed gives all groups of a resharded stage 3 the weight decay of the first, and one shared tensor as step
        # counter, which Adam then increments once per group.
        for group, constant in zip(self._optimizer.param_groups, constants, strict=True):
            group.update(constant)
        for moments in self._optimizer.optimizer.state.values():
            if isinstance(moments.get("step"), Tensor):
                moments["step"] = moments["step"].clone()
        if not same_shape:
            torch.distributed.barrier()
            shutil.rmtree(source, ignore_errors=True)  # as large as the checkpoint, and every rank has what it needs
        if path is None:
            raise ValueError(f"{directory} has a {MANIFEST} but no DeepSpeed checkpoint")
        return manifest["state"]

    def close(self) -> None:
        self._engine.destroy()


def zero_config(config: EngineConfig, parameters: int) -> dict[str, Any]:
    """The DeepSpeed configuration of `config` for a model of that many parameters.

    What has a surprising default is written out.
    """
    bucket = max(1, min(parameters, 200_000_000))  # elements; the default allocates 2 GB for the smallest model
    zero: dict[str, Any] = {"stage": config.zero_stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    ds: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # a formality: batches are flat token streams
        "gradient_accumulation_steps": config.micro_batches_per_step,
        "gradient_clipping": config.max_grad_norm,  # DeepSpeed's default would be 1.0
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }
    if config.precision == "bf16":
        ds["bf16"] = {"enabled": True, "check_grad_overflow": True}
        ds["communication_data_type"] = "fp32"
        if config.zero_stage > 1:  # at stage 1 this option switches to another optimizer wrapper altogether
            ds["data_types"] = {"grad_accum_dtype": "fp32"}
    return ds


def disable_shm_op() -> None:
    """Keep deepspeed from compiling a C++ operator that only inference uses, at every start on a CPU."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _adamw(module: nn.Module, config: EngineConfig) -> torch.optim.AdamW:
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError(f"{type(module).__name__} has no parameter with requires_grad: nothing to train")
    matrices = {"params": [p for p in trainable if p.dim() > 1], "weight_decay": config.weight_decay}
    vectors = {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0}
    groups = [group for group in (matrices, vectors) if group["params"]]  # ZeRO refuses empty groups
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps)


def _set_lr(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _count_down(waiting: int) -> int:
    assert waiting > 0, "more backward() calls than micro_batches_per_step"
    return waiting - 1
