"""The few collectives that training needs, for torch.distributed or for a single process without it."""

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.communication import communicating


def rank() -> int:
    """This process's number in the group, 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes the group has, 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather_with_grad(tensor: Tensor, rows: Sequence[int] | None = None) -> Tensor:
    """[n, ...] on every rank -> [sum of n, ...] in rank order, equal on all ranks; `n` may differ between ranks.

    `rows` says how many every rank has, where that is known already; without it the ranks ask each other first.
    Exact under autograd: what any rank's loss says about this rank's rows comes back, so that the gradient of a
    rank's input is the gradient of the sum of all ranks' losses. All ranks must run backward through it.
    """
    return _AllGather.apply(tensor, rows or _rows_of_ranks(tensor)) if dist.is_initialized() else tensor


def all_gather(tensor: Tensor, rows: Sequence[int] | None = None) -> Tensor:
    """As `all_gather_with_grad`, but the result carries no gradient."""
    tensor = tensor.detach()
    return _gather(tensor, rows or _rows_of_ranks(tensor)) if dist.is_initialized() else tensor


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks as a new tensor without gradient; the argument stays as it is."""
    total = tensor.detach().clone()
    if dist.is_initialized():
        with communicating():
            dist.all_reduce(total)
    return total


def all_gather_objects(value: Any) -> list[Any]:
    """[every rank's value] in rank order: anything that JSON can hold, for errors and decisions rather than for every step."""
    if not dist.is_initialized():
        return [value]
    payload = _on_device(torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8))
    sizes = _rows_of_ranks(payload)
    return [json.loads(bytes(part.tolist())) for part in all_gather(payload, sizes).split(sizes)]


def max_over_ranks(value: int) -> int:
    """The largest of all ranks' numbers."""
    total = _on_device(torch.tensor(value))
    if dist.is_initialized():
        dist.all_reduce(total, op=dist.ReduceOp.MAX)
    return int(total)


def _on_device(tensor: Tensor) -> Tensor:
    """Where the group's backend wants it."""
    return tensor.cuda() if dist.is_initialized() and dist.get_backend() == "nccl" else tensor


def _rows_of_ranks(tensor: Tensor) -> list[int]:
    mine = torch.tensor([len(tensor)], device=tensor.device)
    return _gather(mine, [1] * dist.get_world_size()).tolist()


def _gather(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Collectives want equal shapes: every rank's part is filled up to the longest, and cut again."""
    longest = max(rows)
    filled = tensor.contiguous()
    if len(tensor) < longest:
        filled = torch.cat([filled, filled.new_zeros(longest - len(tensor), *tensor.shape[1:])])
    parts = [torch.empty_like(filled) for _ in rows]
    with communicating():
        dist.all_gather(parts, filled)
    return torch.cat([part[:count] for part, count in zip(parts, rows, strict=True)])


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, tensor: Tensor, rows: Sequence[int]) -> Tensor:
        ctx.rows = list(rows)
        return _gather(tensor, rows)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        total = all_reduce_sum(gradient.contiguous())
        return total.split(ctx.rows)[dist.get_rank()], None
