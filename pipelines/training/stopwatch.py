"""Where the seconds of a step go."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PARTS = ("data", "compute", "communication", "optimizer", "between")
HOLDS_COLLECTIVES = ("compute", "optimizer")


class Stopwatch:
    """Seconds by part, on this rank: `lap` ends one, `read` hands out what came together.

    "data" is the wait for the step's batches; "compute" forward and backward; "communication" what ranks wait for each other and
    exchange, "optimizer" clipping and update; "between" all that comes before the next step's wait: log, validation, checkpoints,
    pictures. On a CPU what `communicated_s` (seconds in collectives so far) says of compute and optimizer is moved to
    communication. On a GPU exchanges run beside the computing and stay where they are called; laps are moments of the device, noted
    without waiting for it.
    """

    def __init__(self, device: "torch.device", communicated_s: Callable[[], float] = lambda: 0.0) -> None:
        self._on_gpu, self._communicated_s = device.type == "cuda", communicated_s
        self._laps: list[tuple[str, object, float]] = []
        self.lap("between")

    def lap(self, part: str) -> None:
        """What passed since the lap before was of `part`."""
        if self._on_gpu:
            import torch

            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._laps.append((part, now, self._communicated_s()))

    def read(self) -> list[float]:
        """Seconds of each of PARTS since the last reading. Waits for the device to come to the last lap."""
        seconds = dict.fromkeys(PARTS, 0.0)
        if self._on_gpu:
            self._laps[-1][1].synchronize()
        for (_, start, before), (part, end, after) in zip(self._laps, self._laps[1:], strict=False):
            exchanged = after - before if part in HOLDS_COLLECTIVES else 0.0
            seconds[part] += (start.elapsed_time(end) / 1e3 if self._on_gpu else end - start) - exchanged
            seconds["communication"] += exchanged
        del self._laps[:-1]
        return list(seconds.values())
