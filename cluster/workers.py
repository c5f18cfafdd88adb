"""Run functions on the cluster: a group of training workers that survives failures, or plain tasks side by side."""

import contextlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cluster import storage
from cluster.session import ClusterConfig, connect, require_room, set_data_defaults

__all__ = ["ClusterConfig", "Worker", "WorkerResult", "connect", "run_tasks", "run_workers"]

_STARTS = "starts"  # one small file per start of the worker group, beside Ray Train's own files of a run


@dataclass(frozen=True)
class WorkerResult:
    """value: what rank 0's function returned. checkpoint_uri: the newest checkpoint, None if none was saved.

    restarts: how often the group was started again in the life of the run, earlier drivers included.
    """

    value: Any
    checkpoint_uri: str | None
    restarts: int


@dataclass(frozen=True)
class Worker:
    """What a function on a worker knows of its group. torch.distributed is initialised (gloo, or nccl with GPUs)."""

    rank: int
    world_size: int
    local_rank: int
    run_uri: str

    @contextlib.contextmanager
    def restore(self) -> Iterator[str | None]:
        """A local folder (read only) with the newest checkpoint, all ranks' files merged; None at the very start."""
        import ray.train

        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as directory:
            yield directory

    def save(self, step: int, write: Callable[[str], None]) -> None:
        """Make a checkpoint of `step`: every rank fills its own folder with `write(folder)`, storage gets them merged.

        Collective. It is uploaded when this returns, and it counts (is complete, restorable, older ones are removed)
        within a poll of Ray Train: a crash right after may restart from the one before. The checkpoint of a step is
        written once: saving the step that is the newest already does nothing.
        """
        import ray.train
        import torch.distributed as dist

        name = f"step_{step:08d}"
        newest = ray.train.get_checkpoint()
        if newest is not None and Path(newest.path).name == name:
            return
        if self.rank == 0:  # what a crash in the middle of an upload left would mix with the new files
            storage.delete(storage.join(self.run_uri, name))
        dist.barrier()
        folder = tempfile.mkdtemp(prefix="moca-checkpoint-")
        try:
            write(folder)
            ray.train.report(
                {"step": step},
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                checkpoint_dir_name=name,
                checkpoint_upload_mode=ray.train.CheckpointUploadMode.SYNC,
                delete_local_checkpoint_after_upload=True,
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def run_workers(
    fn: Callable[[Worker, dict[str, Any]], Any],
    config: dict[str, Any],
    *,
    cluster: ClusterConfig,
    storage_uri: str,
    name: str,
) -> WorkerResult:
    """Run `fn(worker, config)` on `cluster.num_workers` workers until all have returned.

    A worker that dies or raises stops the group, which starts again from the newest checkpoint (`Worker.restore`),
    `max_failures` times at most; then what a worker raised is raised here, or ray.train.TrainingFailedError if a
    process died. Everything a run leaves lies under `storage_uri/name`. Calling with the same two again CONTINUES the
    run, also in another process or with other workers: the name must identify the content. ValueError if the cluster
    has no room.
    """
    connect(cluster)
    require_room(cluster.num_workers, cluster.cpus_per_worker, cluster.gpus_per_worker, cluster.worker_start_timeout_s)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(cluster.worker_start_timeout_s)
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchConfig, TorchTrainer

    filesystem, path = storage.filesystem(storage_uri)
    run_uri = storage.join(storage_uri, name)
    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    trainer = TorchTrainer(
        partial(_worker_main, fn, run_uri, bool(cluster.gpus_per_worker)),
        train_loop_config=config,
        torch_config=TorchConfig(backend="nccl" if cluster.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers, use_gpu=bool(cluster.gpus_per_worker), resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=cluster.checkpoint_keep),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        result = trainer.fit()
    except WorkerGroupError as error:
        _raise_own_error(error)
        raise
    newest = storage.join(run_uri, Path(result.checkpoint.path).name) if result.checkpoint else None
    return WorkerResult(result.return_value, newest, len(storage.list_files(storage.join(run_uri, _STARTS))) - 1)


def run_tasks(fn: Callable[..., Any], items: list[tuple], *, cpus: float, gpus: float) -> list:
    """[fn(*item) for item in items], as tasks side by side, each with its share of CPUs and GPUs; results in order.

    The first task's error is raised once all have ended. A task whose process dies is tried again. ValueError if no
    machine of the cluster has the resources for one task. Needs `connect` first.
    """
    import ray

    if not items:
        return []
    require_room(1, cpus, gpus, ClusterConfig.worker_start_timeout_s)
    task = ray.remote(fn).options(num_cpus=cpus, num_gpus=gpus)
    references = [task.remote(*item) for item in items]
    # Not cancelled at the first error: ray.cancel on a task that is just ending aborts this whole process (Ray 2.60).
    ray.wait(references, num_returns=len(references), fetch_local=False)
    return ray.get(references)


def _worker_main(fn: Callable[[Worker, dict[str, Any]], Any], run_uri: str, gpus: bool, config: dict[str, Any]) -> Any:
    import ray.train

    if not gpus:
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is first imported
    set_data_defaults()
    # A line per report, from a logger that Ray named after its file.
    chatty = Path(ray.train.__file__).with_name("v2") / "_internal" / "execution" / "context.py"
    logging.getLogger(str(chatty)).setLevel(logging.WARNING)
    context = ray.train.get_context()
    rank = context.get_world_rank()
    if rank == 0:
        storage.write_atomic(storage.join(run_uri, _STARTS, f"{time.time_ns()}"), b"")
    return fn(Worker(rank, context.get_world_size(), context.get_local_rank(), run_uri), config)


def _raise_own_error(error: Any) -> None:
    """Raise what a worker raised, if one raised rather than died: the lowest rank's."""
    from ray.exceptions import RayError

    for _, failure in sorted(error.worker_failures.items()):
        if not isinstance(failure, RayError):
            raise failure from error
