"""Seconds that this process spends in collectives, counted where they are called and without making anyone wait.

Only where a collective holds its caller up (gloo, so CPU ranks): on GPUs collectives run beside the computing, and what of them it
had to wait for is told by a profiler alone.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch.distributed as dist

_OF_DEEPSPEED = (
    "all_gather",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_reduce",
    "all_reduce_coalesced",
    "barrier",
    "broadcast",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
)
_seconds = 0.0
_inside = False


def communicated_s() -> float:
    """Seconds in collectives so far."""
    return _seconds


@contextmanager
def communicating() -> Iterator[None]:
    """Counts the block; one within another counts once."""
    global _seconds, _inside
    if _inside or not dist.is_initialized() or dist.get_backend() == "nccl":
        yield
        return
    started, _inside = time.perf_counter(), True
    try:
        yield
    finally:
        _inside = False
        _seconds += time.perf_counter() - started


def count_deepspeed() -> None:
    """From now on DeepSpeed's collectives count too: all of them go through one object."""
    from deepspeed.comm import comm

    for name in _OF_DEEPSPEED:
        collective = getattr(comm.cdb, name, None)
        if collective is not None and name not in vars(comm.cdb):
            setattr(comm.cdb, name, _counted(collective))


def _counted(collective: Callable) -> Callable:
    @wraps(collective)
    def counted(*args: Any, **kwargs: Any) -> Any:
        with communicating():
            handle = collective(*args, **kwargs)
        return handle if handle is None else _Waited(handle)

    return counted


class _Waited:
    """A collective under way, whose wait counts."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)

    def wait(self, *args: Any) -> Any:
        with communicating():
            return self._work.wait(*args)
