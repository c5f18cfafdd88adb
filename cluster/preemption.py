"""The notice that a worker will be taken away: a SIGTERM, or Ray's word that a machine of its group is drained."""

import signal
import threading
from typing import Any

_terminated = threading.Event()


def listen() -> None:
    """From now on a SIGTERM to this training worker is a notice and does not end it."""
    import ray

    # Handlers are set in a process' main thread, where Ray runs an actor's methods; training has a thread of its own.
    ray.get(ray.get_runtime_context().current_actor.__ray_call__.remote(_set_handler))


def noticed() -> bool:
    """Whether this worker has the notice; asks nobody. Ray Train tells all workers of a group, within its poll of 5 s."""
    # ray.train.get_preemption_info() would be a collective through an actor, for every step.
    from ray.train.v2._internal.execution.context import get_train_context

    return _terminated.is_set() or get_train_context().preemption_context.preemption_info is not None


def _set_handler(_: Any) -> None:
    signal.signal(signal.SIGTERM, lambda *_: _terminated.set())
