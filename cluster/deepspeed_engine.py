"""Many processes: DeepSpeed ZeRO behind the contract of cluster/engine.py."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cluster.checkpoint import MANIFEST, ZERO_TAG, read_manifest, reshard_zero, write_manifest
from cluster.communication import count_deepspeed
from cluster.deepspeed_config import disable_shm_op, optimizer_of, require_disk, zero_config
from cluster.engine import EngineConfig, require_same_trained, set_lr, trained_parameters

_CONSTANTS = ("weight_decay", "betas", "eps")


class DeepSpeedEngine:
    """ZeRO 1, 2 or 3 on this process's torch.distributed group: CPU if its backend is gloo, CUDA if it is nccl."""

    def __init__(self, module: nn.Module, config: EngineConfig) -> None:
        if config.zero_stage == 0:
            raise ValueError(
                "zero_stage 0 has nothing for DeepSpeed to share out: use DataParallelEngine (open_engine)"
            )
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
        require_disk(config)
        deepspeed.init_distributed(dist_backend="gloo" if on_cpu else "nccl", auto_mpi_discovery=False, verbose=False)
        trained = trained_parameters(module)
        self._trained = trained
        if scalars := [name for name, parameter in module.named_parameters() if parameter.dim() == 0]:
            raise ValueError(f"{scalars} have no dimension, which DeepSpeed cannot share: give them the shape [1]")
        size = sum(parameter.numel() for parameter in trained.values())
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module.train(),
            optimizer=optimizer_of(trained.values(), config, on_cpu),
            config=zero_config(config, size),
            dist_init_required=False,
        )
        count_deepspeed()
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.device = torch.device(self._engine.device)
        self.module = module
        self._config = config
        self._complete = False  # the last backward of this step was seen
        self._adding_up: ExitStack | None = None

    def forward(self, batch: Any) -> Any:
        return self._engine(batch)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        assert not self._complete, "backward() after the last one of this step"
        self._complete = last
        if self._config.gradient_exchange == "micro_batch":
            self._engine.set_gradient_accumulation_boundary(last)
        elif not last and self._adding_up is None:
            self._adding_up = ExitStack()
            self._adding_up.enter_context(self._one_exchange())
        self._engine.backward(loss * self.world_size)  # DeepSpeed averages over ranks; we sum
        if last and self._adding_up is not None:
            self._adding_up.close()
            self._adding_up = None

    def step(self, lr: float) -> float:
        assert self._complete, "step() before the last backward()"
        self._complete = False
        set_lr(self._optimizer, lr)
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        assert norm is not None, "DeepSpeed did not compute a gradient norm"
        return float(norm)

    def weights(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        whole = {}
        for name, parameter in self._trained.items():  # one at a time on the device
            weight = safe_get_full_fp32_param(parameter)
            if self.rank == 0:
                whole[name] = weight.cpu().clone()
        return whole

    def save(self, directory: str, state: dict[str, Any]) -> None:
        json.dumps(state)  # fails here on every rank, not on rank 0 alone after the shards
        self._engine.save_checkpoint(directory, tag=ZERO_TAG, exclude_frozen_parameters=True)
        if self.rank == 0:
            facts = {"kind": "zero", "world_size": self.world_size, "zero_stage": self._config.zero_stage}
            write_manifest(directory, {**facts, "trained": list(self._trained), "state": state})
        torch.distributed.barrier()  # whoever returns may rely on the manifest

    def load(self, directory: str) -> dict[str, Any]:
        manifest = read_manifest(directory, kind="zero")
        saved, mine = manifest["zero_stage"], self._config.zero_stage
        if (saved == 3) != (mine == 3):
            raise ValueError(
                f"{directory} is of ZeRO stage {saved} and cannot continue at {mine}: set zero_stage={saved}"
            )
        require_same_trained(directory, manifest["trained"], self._trained)
        same_shape = (manifest["world_size"], saved) == (self.world_size, mine)
        source = directory if same_shape else reshard_zero(directory)
        constants = [{key: group[key] for key in _CONSTANTS} for group in self._optimizer.param_groups]
        self._engine._config.load_universal_checkpoint = not same_shape
        # Not strict: what is frozen is not in the file. That the rest is all there was asked above.
        path, _ = self._engine.load_checkpoint(source, tag=ZERO_TAG, load_module_strict=False)
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

    @contextmanager
    def _one_exchange(self) -> Iterator[None]:
        """Gradients add up on every rank in fp32 (DeepSpeed alone would do it in the weights' precision), then meet."""
        for parameter in self._trained.values():
            parameter.grad_dtype = torch.float32
        with self._engine.coalesce_grad_reduction():
            yield
        for parameter in self._trained.values():
            parameter.grad_dtype = parameter.dtype
