"""The Ray session of this process: a cluster that it belongs to, or one that it starts inside itself.

RAY_ADDRESS (set in every Ray job) means the former.
"""

import logging
import os
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.zero import ZeroConfig

_connecting = threading.Lock()

# Ray Data counts a consumer that is busy elsewhere (a long checkpoint, a slow step) and a long task as no progress.
_NO_PROGRESS_S = 7200
_REST_S = 0.02


@dataclass(frozen=True)
class ClusterConfig(ZeroConfig):
    """How much of the cluster a worker group takes. Changes speed and safety, never a result.

    cpus_per_worker may be a fraction: on a small machine the data stages need what is left. data_tasks_per_worker:
    tasks that prepare batches ahead of each worker, at the same time. activation_checkpointing: what layers keep for the backward
    pass, "none" of it computed again, "selective" (what is cheap) or "full". compile_layers: by torch.compile, minutes at the start
    for a faster step on GPUs. tokens_per_forward: of a contrastive batch, how many of a worker's tokens hold activations at a time,
    by GradCache, for the price of a second forward pass; 0: all of them. max_failures: how often
    the group is started again before the run fails. min_workers: where machines come and go, the group starts again with as many
    workers as there is room for, from min_workers to num_workers; None: always num_workers. checkpoint_keep: so many of the newest
    checkpoints are kept, and the best. object_store_mb: Ray's shared memory when it runs inside this
    process. worker_start_timeout_s: how long a cluster that can grow may take to offer the resources.
    """

    num_workers: int = 2
    min_workers: int | None = None
    cpus_per_worker: float = 0.5
    gpus_per_worker: float = 0
    data_tasks_per_worker: int = 2
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    compile_layers: bool = False
    tokens_per_forward: int = 0
    max_failures: int = 3
    object_store_mb: int = 384
    checkpoint_keep: int = 2
    worker_start_timeout_s: float = 120.0

    def __post_init__(self) -> None:
        super().__post_init__()
        least_of = {
            "num_workers": 1,
            "data_tasks_per_worker": 1,
            "checkpoint_keep": 1,
            "max_failures": 0,
            "tokens_per_forward": 0,
            "gpus_per_worker": 0,
        }
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)} must be at least {least}")
        if self.min_workers is not None and not 1 <= self.min_workers <= self.num_workers:
            raise ValueError(
                f"min_workers {self.min_workers} must be from 1 to num_workers={self.num_workers}, or None"
            )
        if self.cpus_per_worker <= 0:
            raise ValueError(f"cpus_per_worker {self.cpus_per_worker} must be positive (0.5 is fine)")
        if self.compile_layers and (self.zero_stage == 3 or self.activation_checkpointing != "none"):
            raise ValueError(
                f"compile_layers with zero_stage {self.zero_stage} and activation_checkpointing {self.activation_checkpointing!r}: "
                "compiled layers hold their weights (stage 0, 1 or 2) and choose themselves what to compute again ('none')"
            )
        if self.object_store_mb < 80:
            raise ValueError(f"object_store_mb {self.object_store_mb} is less than Ray's minimum of 80")
        if self.worker_start_timeout_s <= 0:
            raise ValueError(f"worker_start_timeout_s {self.worker_start_timeout_s} must be positive")


_start_timeout_s = ClusterConfig.worker_start_timeout_s


def connect(config: ClusterConfig) -> None:
    """Make `ray` usable in this process, with this project's defaults for Ray Data; calling it again is fine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A report waits for the controller's next poll, and saving a checkpoint is a report.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # it prints every line twice
    os.environ.setdefault("RAY_DATA_STARVATION_WARNING_DELAY_S", str(_NO_PROGRESS_S))
    import ray

    global _start_timeout_s
    with _connecting:
        _start_timeout_s = config.worker_start_timeout_s
        if not ray.is_initialized():
            variables = {
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "PYTHONWARNINGS": "ignore::FutureWarning",  # DeepSpeed on this torch: one per worker and collective
                "RAY_DATA_STARVATION_WARNING_DELAY_S": str(_NO_PROGRESS_S),
            }
            if not config.gpus_per_worker:  # whoever imports deepspeed (accelerate does) need not look, and warn
                variables["DS_ACCELERATOR"] = "cpu"
            if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:  # a submitted job brings its code along
                repository = str(Path(__file__).resolve().parents[1])
                variables["PYTHONPATH"] = os.pathsep.join(filter(None, [repository, os.environ.get("PYTHONPATH")]))
            if on_a_cluster():
                ray.init(
                    logging_level=logging.WARNING,
                    runtime_env={
                        "env_vars": _unset(variables),
                        "worker_process_setup_hook": "cluster.session.prepare_process_of_cluster",
                    },
                )
            else:
                variables["OMP_NUM_THREADS"] = "1"
                os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes this machine away
                ray.init(
                    address="local",
                    # Logical: with one CPU per core, two workers would leave none to the data tasks that feed them.
                    num_cpus=max(4, os.cpu_count() or 1),
                    include_dashboard=False,
                    object_store_memory=config.object_store_mb * 2**20,
                    logging_level=logging.ERROR,  # warns about its own new defaults
                    runtime_env={
                        "env_vars": _unset(variables),
                        "worker_process_setup_hook": "cluster.session.prepare_process",
                    },
                )
        set_data_defaults()


def start_timeout_s() -> float:
    """How long whoever connected last wants to wait for machines (`worker_start_timeout_s`)."""
    return _start_timeout_s


def set_data_defaults() -> None:
    """Ray Data in this process: keep row order, no progress bars (steps report their own), give up when nothing moves for hours."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # a ValueError of ours, not "UDF failed to process a data block"
    context.execution_no_progress_timeout_s = _NO_PROGRESS_S
    if RestBetweenSteps not in context.custom_execution_callback_classes:
        context.custom_execution_callback_classes.append(RestBetweenSteps)
    # Of `scheduling_strategy`, which the named parameters that it asks for instead lack (Ray 2.60; cluster/placement.py).
    warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # warns that the bars are off
    logging.getLogger("ray.train").setLevel(logging.WARNING)


class RestBetweenSteps:
    """A Ray Data execution callback that lets the scheduling thread sleep a little in every turn of its loop.

    While a consumer is slower than its stream and no task runs, that loop (Ray 2.60) spins without a pause: in a training
    worker it takes the interpreter from the training thread (figures in docs/log.md).
    """

    def before_execution_starts(self, executor: Any) -> None: ...

    def on_execution_step(self, executor: Any) -> None:
        time.sleep(_REST_S)

    def after_execution_succeeds(self, executor: Any) -> None: ...

    def after_execution_fails(self, executor: Any, error: Exception) -> None: ...


def prepare_process() -> None:
    """Ray calls this when one of its processes starts.

    Ray Train asks for the state of its controller at the address of the cluster that was last started on the machine, were it
    another one or long gone (12 s more for every training). Without a dashboard, the same part would warn once a second.
    """
    import ray

    os.environ["RAY_API_SERVER_ADDRESS"] = ray.get_runtime_context().gcs_address
    module = "ray.train.v2._internal.execution.controller.placement_group_cleaner"
    logging.getLogger(module).setLevel(logging.ERROR)


def prepare_process_of_cluster() -> None:
    """Ray calls this when one of our processes starts on a cluster.

    gloo offers other machines the address of this machine's own name, which Debian and Ubuntu make 127.0.1.1. Here it is told
    which network Ray uses.
    """
    import psutil
    import ray

    address = ray.util.get_node_ip_address()
    for interface, addresses in psutil.net_if_addrs().items():
        if address in [one.address for one in addresses]:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def on_a_cluster() -> bool:
    """Whether Ray runs outside of this process, in a job or at an address that the user gave."""
    return bool(os.environ.get("RAY_ADDRESS"))


def _unset(variables: dict[str, str]) -> dict[str, str]:
    """Those that the user or the job did not set already; PYTHONPATH extends what was there."""
    return {name: value for name, value in variables.items() if name == "PYTHONPATH" or name not in os.environ}
