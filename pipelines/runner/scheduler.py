"""Running a plan: every step as soon as what it needs is there, independent branches side by side."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import UTC, datetime

from cluster import storage
from pipelines.runner import record
from pipelines.runner.plan import Planned
from pipelines.runner.record import Artifact, Record

# By URI: of plans that run side by side in this process, one makes what they share.
_making: dict[str, threading.Lock] = {}


class StepFailed(RuntimeError):
    """A step raised; its own error is the cause."""

    def __init__(self, step: str) -> None:
        super().__init__(f"step {step} failed")
        self.step = step

    def __reduce__(self):
        return StepFailed, (self.step,)


def run_plan(
    plan: Sequence[Planned],
    execute: Callable[[Planned, dict[str, Artifact]], tuple[dict, str]],
    environment: dict[str, str],
) -> dict[str, Artifact]:
    """Runs what is not done, in threads of this process (the steps themselves run on the cluster), and returns all artifacts.

    `execute` returns a step's result and the id of its tracking run.
    After a failure nothing new starts, running steps finish, and StepFailed is raised: what is done stays done.
    """
    artifacts = {p.step.name: Artifact(p.uri, p.done.result) for p in plan if p.done}
    waiting = [p for p in plan if not p.done]
    running: dict[Future, Planned] = {}
    failure: tuple[Planned, BaseException] | None = None
    pool = ThreadPoolExecutor(max_workers=max(1, len(waiting)), thread_name_prefix="step")
    try:
        while running or (waiting and not failure):
            ready = [] if failure else [p for p in waiting if all(n in artifacts for n in p.step.needs)]
            for planned in ready:
                waiting.remove(planned)
                inputs = {name: artifacts[name] for name in planned.step.needs}
                running[pool.submit(_run_step, planned, inputs, execute, environment)] = planned
            assert running, f"steps that can never start: {[p.step.name for p in waiting]}"
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                planned = running.pop(future)
                if error := future.exception():
                    failure = failure or (planned, error)
                else:
                    artifacts[planned.step.name] = future.result()
    finally:
        pool.shutdown(wait=False)  # an interrupt must not wait for a training run
    if failure:
        raise StepFailed(failure[0].step.name) from failure[1]
    return artifacts


def _run_step(planned: Planned, inputs, execute, environment) -> Artifact:
    with _making.setdefault(planned.uri, threading.Lock()):
        if done := record.read(planned.uri):  # made since this was planned
            return Artifact(planned.uri, done.result)
        if not planned.step.resumable:
            storage.delete(planned.uri)  # half of an interrupted attempt
        started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
        result, tracking_run = execute(planned, inputs)
        record.write(
            planned.uri,
            Record(
                step=planned.step.name,
                fingerprint=planned.fingerprint,
                payload=planned.payload,
                result=result,
                started=started,
                duration_s=round(time.perf_counter() - clock, 3),
                environment=environment,
                tracking_run=tracking_run,
            ),
        )
        for name in planned.step.leftovers:  # not before: what comes last in a step may fail, and it goes on from these
            storage.delete(storage.join(planned.uri, name))
        return Artifact(planned.uri, result)
