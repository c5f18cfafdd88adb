"""When to give a run up: losses that are not finite, or that rise and stay up."""

import math
from collections import deque

WINDOW_STEPS = 50  # long enough for a mixture of tasks of different losses


class Guard:
    """Watches the total loss. Its state travels in checkpoints, so that a resumed run is judged as an undisturbed one."""

    def __init__(self, abort_above: float, state: dict | None = None) -> None:
        state = state or {"first": [], "last": []}
        self.abort_above = abort_above
        self.first: list[float] = state["first"]
        self.last: deque[float] = deque(state["last"], maxlen=WINDOW_STEPS)

    @property
    def state(self) -> dict:
        return {"first": self.first, "last": list(self.last)}

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """What is wrong after this step, None if nothing is."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return f"loss {loss}, gradient norm {grad_norm}"
        if len(self.first) < WINDOW_STEPS:
            self.first.append(loss)
            return None
        self.last.append(loss)
        began, now = (sum(window) / len(window) for window in (self.first, self.last))
        if self.abort_above and len(self.last) == WINDOW_STEPS and now > self.abort_above * began:
            return (
                f"the loss diverges: {now:.4g} on average over the last {WINDOW_STEPS} steps, {began:.4g} over the first {WINDOW_STEPS}; "
                "lower the learning rate or max_grad_norm, or set abort_above=0 to go on all the same"
            )
        return None
