"""Many processes that share nothing (ZeRO stage 0): plain data parallelism behind the contract of cluster/engine.py."""

import json
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from cluster.communication import communicating
from cluster.engine import EngineConfig
from cluster.torch_engine import TorchEngine


class DataParallelEngine(TorchEngine):
    """TorchEngine on every rank of this process's torch.distributed group, over the sum of their gradients.

    DeepSpeed's own stage 0 would not do: in fp32 it knows neither norm nor overflow, in bf16 it rounds the sum over
    micro-batches. A checkpoint is one file, which any number of ranks, and a TorchEngine, can load.
    """

    def __init__(self, module: nn.Module, config: EngineConfig) -> None:
        if not dist.is_initialized():
            raise ValueError("DataParallelEngine needs a torch.distributed group (run_workers makes one)")
        on_cpu = dist.get_backend() != "nccl"
        super().__init__(module, config, "cpu" if on_cpu else f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        with torch.no_grad():
            for tensor in self._saved().values():
                dist.broadcast(self._weight(tensor), src=0)
        self._copy_masters()

    def step(self, lr: float) -> float:
        self._fill_gradients()
        with communicating():
            sums = [dist.all_reduce(weight.grad, async_op=True) for weight in self._weights()]
            for running in sums:
                running.wait()
        return super().step(lr)

    def save(self, directory: str, state: dict[str, Any]) -> None:
        json.dumps(state)  # fails here on every rank, not on rank 0 alone
        if self.rank == 0:
            super().save(directory, state)
        dist.barrier()  # whoever returns may rely on the manifest
