"""The few collectives that training needs, for torch.distributed or for a single process without it."""

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """This process's number in the group, 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes the group has, 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather_with_grad(tensor: Tensor) -> Tensor:
    """[n, ...] on every rank -> [world * n, ...] in rank order, equal on all ranks; shapes must be equal.

    Exact under autograd: what any rank's loss says about this rank's rows comes back, so that the gradient of a
    rank's input is the gradient of the sum of all ranks' losses. All ranks must run backward through it.
    """
    return _AllGather.apply(tensor) if dist.is_initialized() else tensor


def all_gather(tensor: Tensor) -> Tensor:
    """As `all_gather_with_grad`, but the result carries no gradient."""
    return _gather(tensor.detach()) if dist.is_initialized() else tensor.detach()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks as a new tensor without gradient; the argument stays as it is."""
    total = tensor.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def _gather(tensor: Tensor) -> Tensor:
    assert tensor.dim() > 0, "a scalar has no rows to gather"
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, tensor: Tensor) -> Tensor:
        return _gather(tensor)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        total = all_reduce_sum(gradient.contiguous())
        return total.chunk(dist.get_world_size())[dist.get_rank()]
