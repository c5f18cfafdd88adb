"""How much of a training worker's processor Ray Data's scheduling thread takes while training is slower than its stream.

    python benchmarks/stream_rest.py

A consumer that computes (a fixed piece of numpy work per batch, standing for a training step) reads a stream that is always ahead of
it. Baseline: Ray Data as it is. Ours: with `cluster.session.RestBetweenSteps`. Printed: steps per second and processor seconds of the
consuming process per second, and their ratios.
"""

import time

import numpy as np

from cluster.session import ClusterConfig, RestBetweenSteps, connect

BATCHES = 160
BYTES_PER_BATCH = 64 * 2**10


def make_batch(row: dict) -> dict:
    return {"batch": bytes(BYTES_PER_BATCH), **row}


def step(work: np.ndarray) -> None:
    """About a twentieth of a second of many small operations, each of which needs the interpreter: what a training step looks like."""
    deadline = 4000
    for _ in range(deadline):
        work = np.tanh(work * 0.99)


def consume(rest: bool) -> tuple[float, float]:
    """(steps per second, processor seconds per second) of this process over the stream."""
    import ray.data
    from ray.data import DataContext, TaskPoolStrategy

    DataContext.get_current().custom_execution_callback_classes = [RestBetweenSteps] if rest else []
    dataset = ray.data.range(BATCHES, override_num_blocks=BATCHES // 4)
    dataset = dataset.map(make_batch, num_cpus=0.25, compute=TaskPoolStrategy(size=2))
    work, seen = np.linspace(-1, 1, 256), 0
    for _ in dataset.iter_rows():
        if seen == 10:  # start-up is not what is measured
            started, cpu = time.perf_counter(), time.process_time()
        step(work)
        seen += 1
    elapsed = time.perf_counter() - started
    return (seen - 10) / elapsed, (time.process_time() - cpu) / elapsed


def main() -> None:
    connect(ClusterConfig())
    consume(rest=True)  # the first run pays for starting the task processes
    for repeat in range(2):
        plain, plain_cpu = consume(rest=False)
        rested, rested_cpu = consume(rest=True)
        print(
            f"run {repeat}: steps/s without rest {plain:.1f}, with {rested:.1f}, ratio {rested / plain:.2f}; "
            f"processors used without {plain_cpu:.2f}, with {rested_cpu:.2f}"
        )


if __name__ == "__main__":
    main()
