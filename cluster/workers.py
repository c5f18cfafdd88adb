"""Run functions on the cluster: a group of training workers that survives failures, or plain tasks side by side."""

import contextlib
import logging
import os
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cluster import ledger, preemption, storage
from cluster.placement import for_training, on_cpus, require_room
from cluster.session import ClusterConfig, connect, set_data_defaults
from cluster.uploads import Uploads, remove_leftovers

__all__ = ["ClusterConfig", "Worker", "WorkerResult", "connect", "run_tasks", "run_workers"]


@dataclass(frozen=True)
class WorkerResult:
    """value: what rank 0's function returned. checkpoint_uri: the newest checkpoint, None if none was saved.

    best_uri: the one with the lowest score, None without scores. restarts: how often the group was started again in the life of the
    run, earlier drivers included.
    """

    value: Any
    checkpoint_uri: str | None
    best_uri: str | None
    restarts: int


@dataclass(frozen=True)
class Worker:
    """What a function on a worker knows of its group. torch.distributed is initialised (gloo, or nccl with GPUs).

    Ranks and world_size hold for one start of the group; the next one may be smaller or larger.
    """

    rank: int
    world_size: int
    local_rank: int
    run_uri: str
    _newest: int | None  # step of the checkpoint to go on from
    _uploads: Uploads

    @contextlib.contextmanager
    def restore(self) -> Iterator[str | None]:
        """A local folder (read only) with the newest checkpoint, all ranks' files merged; None at the very start."""
        import ray.train

        if self._newest is None:
            yield None
            return
        filesystem, path = storage.filesystem(storage.join(self.run_uri, ledger.name_of(self._newest)))
        with ray.train.Checkpoint(path, filesystem).as_directory() as directory:
            yield directory

    def save(self, step: int, write: Callable[[str], None], score: float | None = None) -> None:
        """Make a checkpoint of `step`: every rank fills its own folder with `write(folder)`, storage gets them merged.

        Collective. It is written when this returns, and goes to storage in the background, where it counts from the moment that
        all ranks' files are there: a crash before that restarts from the one before. One is on its way at a time: with a slow
        storage this waits for the one before. All are stored when the function has returned. Rank 0's `score` counts, lower is
        better: the best checkpoint is kept besides the newest. The checkpoint of a step is written once: saving the step of the
        newest again does nothing. OSError (and a new start of the group) where one could not be stored.
        """
        if self._uploads.step != step:
            self._uploads.start(step, write, score)

    def preempted(self) -> bool:
        """Whether the machine, or this process by a SIGTERM, is about to be taken away: the time for a checkpoint.

        This rank's own view, without asking anyone: for one step or two, ranks may differ. The group goes on until it is killed.
        """
        return preemption.noticed()


def run_workers(
    fn: Callable[[Worker, dict[str, Any]], Any],
    config: dict[str, Any],
    *,
    cluster: ClusterConfig,
    storage_uri: str,
    name: str,
) -> WorkerResult:
    """Run `fn(worker, config)` on `cluster.num_workers` workers until all have returned.

    A worker that dies, and an error of connections or storage, stops the group, which starts again from the newest checkpoint
    (`Worker.restore`), `max_failures` times at most; with `cluster.min_workers` with as many workers as there is room for. An
    error of code (ValueError, KeyError, AssertionError, FloatingPointError, a missing file, ...) on any rank ends the run at once,
    and so does any other that comes twice without a checkpoint in between. What a worker raised is raised here, its
    traceback in a note, or ray.train.TrainingFailedError if a process died. Everything a run leaves lies under `storage_uri/name`.
    Calling with the same two again CONTINUES the run, also in another process or with other workers: the name must identify the
    content. ValueError if the cluster has no room.
    """
    connect(cluster)
    fewest = cluster.min_workers or cluster.num_workers
    cpus, gpus = cluster.cpus_per_worker, cluster.gpus_per_worker
    require_room(fewest, cpus, gpus, training=True)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(cluster.worker_start_timeout_s)
    from ray.train import TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    run_uri = storage.join(storage_uri, name)
    # Ray Train's own list of checkpoints, which `ledger` takes the place of.
    storage.delete(storage.join(run_uri, "checkpoint_manager_snapshot.json"))
    trainer = TorchTrainer(
        partial(_worker_main, fn, run_uri, bool(cluster.gpus_per_worker)),
        train_loop_config=config,
        torch_config=TorchConfig(backend="nccl" if cluster.gpus_per_worker else "gloo"),
        scaling_config=_scaling(cluster),
        run_config=_run(cluster, storage_uri, name),
    )
    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        own = _own_error(error)
        if own is None:
            raise
        raise own from error
    kept = ledger.read(run_uri)
    newest, best = (
        storage.join(run_uri, e.name) if e else None for e in (kept[-1] if kept else None, ledger.best(kept))
    )
    return WorkerResult(result.return_value, newest, best, len(ledger.starts(run_uri)) - 1)


def run_tasks(fn: Callable[..., Any], items: list[tuple], *, cpus: float, gpus: float) -> list:
    """[fn(*item) for item in items], as tasks side by side, each with its share of CPUs and GPUs; results in order.

    The first task's error is raised once all have ended. A task whose process dies is tried again. ValueError if no
    machine of the cluster has the resources for one task. Needs `connect` first.
    """
    import ray

    if not items:
        return []
    require_room(1, cpus, gpus)
    task = ray.remote(fn).options(num_cpus=cpus, num_gpus=gpus, **({} if gpus else on_cpus()))
    references = [task.remote(*item) for item in items]
    # Not cancelled at the first error: ray.cancel on a task that is just ending aborts this whole process (Ray 2.60).
    ray.wait(references, num_returns=len(references), fetch_local=False)
    return ray.get(references)


def _scaling(cluster: ClusterConfig) -> Any:
    from ray.train import ScalingConfig

    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    workers = (cluster.min_workers, cluster.num_workers) if cluster.min_workers else cluster.num_workers
    return ScalingConfig(
        num_workers=workers,
        use_gpu=bool(cluster.gpus_per_worker),
        resources_per_worker=resources,
        **for_training(cluster.gpus_per_worker),
    )


def _run(cluster: ClusterConfig, storage_uri: str, name: str) -> Any:
    from ray.train import FailureConfig, LoggingConfig, RunConfig

    from cluster.supervisor import Supervisor

    filesystem, path = storage.filesystem(storage_uri)
    return RunConfig(
        name=name,
        storage_path=path,
        storage_filesystem=filesystem,
        failure_config=FailureConfig(max_failures=cluster.max_failures, max_preemption_failures=cluster.max_failures),
        callbacks=[Supervisor(storage.join(storage_uri, name), cluster.checkpoint_keep)],
        logging_config=LoggingConfig(log_level="WARNING"),
    )


def _worker_main(fn: Callable[[Worker, dict[str, Any]], Any], run_uri: str, gpus: bool, config: dict[str, Any]) -> Any:
    import ray.train

    if not gpus:
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is first imported
    set_data_defaults()
    # A line per report, from a logger that Ray named after its file.
    chatty = Path(ray.train.__file__).with_name("v2") / "_internal" / "execution" / "context.py"
    logging.getLogger(str(chatty)).setLevel(logging.WARNING)
    preemption.listen()
    context = ray.train.get_context()
    rank, world_size, local_rank = context.get_world_rank(), context.get_world_size(), context.get_local_rank()
    start, newest = _start(run_uri, rank, local_rank)
    uploads = Uploads(run_uri, start, newest)
    try:
        return fn(Worker(rank, world_size, local_rank, run_uri, newest, uploads), config)
    except Exception as error:
        below = "".join(traceback.format_tb(error.__traceback__)[1:])
        error.add_note(f"Raised on rank {rank} of {world_size} in start {start} of the group:\n{below}")
        uploads.settle()  # a checkpoint that is on its way counts
        raise


def _start(run_uri: str, rank: int, local_rank: int) -> tuple[str, int | None]:
    """(name of this start of the group, step of the checkpoint to go on from), agreed by all ranks; what crashes left is gone."""
    from ray.train.collective import broadcast_from_rank_zero

    found = None
    if local_rank == 0:
        remove_leftovers(run_uri)
    if rank == 0:
        start = ledger.begin(run_uri)
        ledger.sweep(run_uri)
        kept = ledger.read(run_uri)
        found = start, kept[-1].step if kept else None
    start, newest = broadcast_from_rank_zero(found)
    if start not in ledger.starts(run_uri):
        raise ValueError(
            f"{run_uri} is another place on every machine: s3:// or a folder that all machines share is needed"
        )
    return start, newest


def _own_error(error: Any) -> Exception | None:
    """What a worker raised, the lowest rank first; None if a process died, of which all else may be the consequence."""
    from ray.train import ControllerError, WorkerGroupError

    from cluster.supervisor import is_of_process

    if isinstance(error, ControllerError):
        return error.controller_failure
    failures = (
        [failure for _, failure in sorted(error.worker_failures.items())] if isinstance(error, WorkerGroupError) else []
    )
    return failures[0] if failures and not any(map(is_of_process, failures)) else None
