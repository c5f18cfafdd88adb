"""Processes that make a torch.distributed group, forked from one server that imports what is slow to import once for all tests."""

import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SLOW = (
    "deepspeed",
    "moca_core.backbone",
    *(f"transformers.models.{f}.modeling_{f}" for f in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")),
)
PATIENCE = timedelta(seconds=120)  # a rank that waits for one that never comes fails then


def on_ranks(main, world, *args):
    """What `main(*args)` returns on the first rank of `world` CPU processes, all of which run it."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")  # asked when deepspeed is imported
        multiprocessing.set_forkserver_preload(list(SLOW))
        mp.start_processes(
            _rank, (world, folder, dict(os.environ), main, args), nprocs=world, start_method="forkserver"
        )
        return torch.load(f"{folder}/result.pt", weights_only=False)


@contextmanager
def small_weights_shared() -> Iterator[None]:
    """ZeRO-3 leaves weights below 100 000 values whole on every rank, so all of a tiny model. Not here."""
    from cluster import deepspeed_engine

    def shared(*args, zero_config=deepspeed_engine.zero_config):
        config = zero_config(*args)
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed_engine, "zero_config", shared)
        yield


def _rank(rank, world, folder, environment, main, args):
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=world, timeout=PATIENCE)
    result = main(*args)
    if rank == 0:
        torch.save(result, f"{folder}/result.pt")
    dist.barrier()
    dist.destroy_process_group()
