"""What DeepSpeed is told: its configuration and its optimizer, with everything written out that has a surprising default."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from cluster.engine import EngineConfig, adamw, decay_groups


def zero_config(config: EngineConfig, parameters: int) -> dict[str, Any]:
    """The DeepSpeed configuration of `config` for that many trained parameters."""
    # In elements: the default allocates 2 GB for the smallest model, and an odd number is refused.
    bucket = min(parameters + parameters % 2, 200_000_000)
    zero: dict[str, Any] = {"stage": config.zero_stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    for name, device in (("offload_optimizer", config.offload_optimizer), ("offload_param", config.offload_parameters)):
        if device != "none":
            zero[name] = {"device": device} | ({"nvme_path": config.nvme_path} if device == "nvme" else {})
    ds: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # a formality: batches are flat token streams
        "gradient_accumulation_steps": 1,  # a formality too: `last` says where a step ends
        "gradient_clipping": config.max_grad_norm,  # DeepSpeed's default would be 1.0
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # `optimizer_of` has chosen
        "steps_per_print": None,
    }
    if config.precision == "bf16":
        ds["bf16"] = {"enabled": True, "check_grad_overflow": True}
        ds["communication_data_type"] = "fp32"
        if config.zero_stage > 1:  # at stage 1 this option switches to another optimizer wrapper altogether
            ds["data_types"] = {"grad_accum_dtype": "fp32"}
    return ds


def optimizer_of(weights: Iterable[Tensor], config: EngineConfig, on_cpu: bool) -> torch.optim.Optimizer:
    """AdamW; for what a GPU has offloaded, DeepSpeed's own, compiled for the host's CPU at the first start."""
    if on_cpu or config.offload_optimizer == "none":
        return adamw(weights, config)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(decay_groups(weights, config), lr=0.0, betas=config.betas, eps=config.eps)


def require_disk(config: EngineConfig) -> None:
    """ValueError where an offload to disk is wanted and its operator cannot be built."""
    if config.nvme_path is None:
        return
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ValueError(
            "offload to 'nvme' needs DeepSpeed's async_io operator, which cannot be built here: install libaio-dev and "
            "a C++ compiler on every machine, or offload to 'cpu'"
        )


def disable_shm_op() -> None:
    """Keep deepspeed from compiling a C++ operator that only inference uses, at every start on a CPU."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
