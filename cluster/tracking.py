"""What happened, in MLflow.

Only MlflowClient with explicit run ids: steps run in threads, and MLflow's "active run" is global.
"""

import logging
import os
import posixpath
import re
import tempfile
import time
import warnings
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cluster.storage import absolute, is_local, join

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from mlflow.models import ModelSignature

_FLUSH_S = 2.0
_BATCH = 100  # entries per request; the server's limit for parameters
_LONGEST_NAME = 250


def tracking_uri(root_uri: str, configured: str | None) -> str:
    """Where to track: `configured`, else $MLFLOW_TRACKING_URI, else a SQLite file in a local root.

    ValueError for a root on S3 without a server: a database cannot live there, and one beside the driver would be
    lost with it. Also for a password in the address, which is written into records, parameters and logs.
    """
    chosen = configured or os.environ.get("MLFLOW_TRACKING_URI")
    if chosen:
        if urlsplit(chosen).password:
            raise ValueError(
                f"the MLflow address of {urlsplit(chosen).hostname} has a password in it, which everybody would see: give it in "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (of a database: in PGPASSWORD or the like)"
            )
        return chosen
    if not is_local(root_uri):
        raise ValueError(
            f"the root {root_uri} is not local, so MLflow needs a server: set MLFLOW_TRACKING_URI, e.g. http://mlflow:5000"
        )
    return f"sqlite:///{absolute(root_uri)}/mlflow.db"


def how_to_look(uri: str) -> str:
    """For the screen: the address of a server, or the command that shows a database."""
    return uri if uri.startswith(("http://", "https://")) else f"mlflow ui --backend-store-uri {uri}"


def open_tracker(uri: str, experiment: str, artifact_root: str) -> "Tracker":
    """Connect, making database and experiment where they are missing.

    Artifacts of a new experiment go below `artifact_root`. Call it once in the driver before any worker calls
    `attach`: processes that race to make a SQLite database destroy it. ValueError if the experiment was deleted in
    MLflow.
    """
    client = _client(uri)
    found = _first_contact(client, uri, experiment)
    if found is None:
        location = join(absolute(artifact_root), experiment)
        return Tracker(client, client.create_experiment(experiment, artifact_location=location))
    if found.lifecycle_stage != "active":
        raise ValueError(
            f"the MLflow experiment {experiment!r} at {uri} is deleted: restore it there, or choose another name"
        )
    return Tracker(client, found.experiment_id)


def _first_contact(client: "MlflowClient", uri: str, experiment: str) -> Any:
    """The experiment, or None. A server that does not answer is a ValueError within a minute, not after all of MLflow's retries."""
    from mlflow.exceptions import MlflowException

    patience = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "15"}
    unset = {name: value for name, value in patience.items() if name not in os.environ}
    os.environ.update(unset)
    try:
        return client.get_experiment_by_name(experiment)
    except MlflowException as error:
        raise ValueError(f"MLflow at {uri} does not answer: {str(error).splitlines()[0][:300]}") from None
    finally:
        for name in unset:
            del os.environ[name]


def attach(uri: str, run_id: str) -> "Run":
    """A run that another process started, to log into from here.

    Metrics are buffered: call `flush` before a checkpoint and at the end.
    """
    client = _client(uri)
    return Run(client, run_id, client.get_run(run_id).info.experiment_id, flush_every_s=_FLUSH_S)


class Tracker:
    """One experiment of a tracking server or database."""

    def __init__(self, client: "MlflowClient", experiment_id: str) -> None:
        self.client = client
        self.experiment_id = experiment_id

    def start_run(self, name: str, parent: "Run | None" = None, tags: dict[str, str] | None = None) -> "Run":
        """A new run, shown below `parent` if there is one. It is RUNNING until `Run.finish`."""
        everything = {"mlflow.runName": name, **(tags or {})}
        if parent is not None:
            everything["mlflow.parentRunId"] = parent.run_id
        run = self.client.create_run(self.experiment_id, run_name=name, tags=everything)
        return Run(self.client, run.info.run_id, self.experiment_id, flush_every_s=0.0)

    def kill_below(self, run_id: str) -> None:
        """Ends as KILLED what is still RUNNING below a run, at any depth: for a process that leaves its threads behind."""
        for run in self.client.search_runs([self.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'"):
            self.kill_below(run.info.run_id)
            if run.info.status == "RUNNING":
                self.client.set_terminated(run.info.run_id, "KILLED")


class Run:
    """One run. Not to be shared among threads; several processes may `attach` to it."""

    def __init__(self, client: "MlflowClient", run_id: str, experiment_id: str, *, flush_every_s: float) -> None:
        self.client = client
        self.run_id = run_id
        self._experiment_id = experiment_id
        self._flush_every_s = flush_every_s
        self._flushed = time.monotonic()
        self._buffer: list[Metric] = []

    def log_params(self, params: dict[str, Any]) -> None:
        """Parameters by (dotted) name. MLflow refuses to change one that is there already."""
        from mlflow.entities import Param

        entries = [Param(allowed(name), str(value)) for name, value in params.items()]
        for start in range(0, len(entries), _BATCH):
            self.client.log_batch(self.run_id, params=entries[start : start + _BATCH])

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Values at a step (None: 0). An attached run sends them every two seconds at most, another at once."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        self._buffer += [Metric(allowed(key), float(value), now_ms, step or 0) for key, value in metrics.items()]
        if time.monotonic() - self._flushed >= self._flush_every_s:
            self.flush()

    def flush(self) -> None:
        """Send what is buffered. What cannot be sent is not tried again: the error would come back at `finish`."""
        entries, self._buffer = self._buffer, []
        for start in range(0, len(entries), _BATCH):
            self.client.log_batch(self.run_id, metrics=entries[start : start + _BATCH])
        self._flushed = time.monotonic()

    def log_dataset(self, name: str, uri: str, digest: str, context: str) -> None:
        """Record that this run read the data at `uri`, without reading it. MLflow keeps 36 characters of the digest."""
        from mlflow.data.code_dataset_source import CodeDatasetSource
        from mlflow.data.dataset_source_registry import resolve_dataset_source
        from mlflow.data.meta_dataset import MetaDataset
        from mlflow.entities import DatasetInput, InputTag

        if uri.startswith("hf://"):  # MLflow's own source for these would ask the hub
            source = CodeDatasetSource(tags={"uri": uri})
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The specified dataset source can be interpreted in multiple ways")
                source = resolve_dataset_source(uri)
        dataset = MetaDataset(source=source, name=name, digest=digest[:36])
        tags = [InputTag("mlflow.data.context", context)]
        self.client.log_inputs(self.run_id, [DatasetInput(dataset._to_mlflow_entity(), tags)])

    def log_artifact(self, local_path: str, folder: str | None = None) -> None:
        """Copy a local file, or a folder, to the run's artifacts, or to a folder of them."""
        self.client.log_artifact(self.run_id, local_path, folder)

    def log_model(
        self,
        name: str,
        code_path: str,
        model_dir: str,
        pip_requirements: list[str],
        columns: dict[str, str],
        output_shape: tuple[int, ...],
    ) -> str:
        """Log a model from code: the Python file `code_path` and the folder of weights that it loads, as they are.

        The code calls mlflow.models.set_model, and finds the folder as context.artifacts["model"]. It takes a table with some of
        the `columns` ({name: MLflow's name of its type}) and gives float32 values of `output_shape`, -1 for the rows. Returns
        the models:/ URI, for mlflow.pyfunc.load_model.
        """
        import mlflow.pyfunc
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import Model

        logged = self.client.create_logged_model(self._experiment_id, name=name, source_run_id=self.run_id)
        with tempfile.TemporaryDirectory(prefix="moca-model-") as folder:
            target = os.path.join(folder, "model")
            mlflow.pyfunc.save_model(
                target,
                python_model=code_path,
                artifacts={"model": model_dir},
                pip_requirements=pip_requirements,
                signature=_signature(columns, output_shape),
                mlflow_model=Model(run_id=self.run_id, model_id=logged.model_id),
            )
            self.client.log_model_artifacts(logged.model_id, target)
        self.client.finalize_logged_model(logged.model_id, "READY")
        self.client.log_outputs(self.run_id, [LoggedModelOutput(logged.model_id, step=0)])
        return f"models:/{logged.model_id}"

    def register_model(self, name: str, model_uri: str, alias: str, description: str) -> str:
        """A new version of the registered model `name`, which `alias` names from now on. Returns the version."""
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                raise
        model_id = model_uri.removeprefix("models:/")
        files = self.client.get_logged_model(
            model_id
        ).artifact_location  # a models:/ URI would be looked up where MLflow's global one points
        made = self.client.create_model_version(
            name, source=files, run_id=self.run_id, model_id=model_id, description=description
        )
        self.client.set_registered_model_alias(name, alias, made.version)
        return str(made.version)

    def finish(self, status: str) -> None:
        """End the run as "FINISHED", "FAILED" or "KILLED"."""
        if status not in ("FINISHED", "FAILED", "KILLED"):
            raise ValueError(f"status {status!r} must be FINISHED, FAILED or KILLED")
        self.flush()
        self.client.set_terminated(self.run_id, status)


def allowed(name: str) -> str:
    """The name of a metric or a parameter as MLflow takes it: those made of what a user calls tasks and files may hold anything."""
    kept = posixpath.normpath(re.sub(r"[^\w./ :-]", "_", name)).lstrip("./")
    return kept[:_LONGEST_NAME] or "_"


def _signature(columns: dict[str, str], output_shape: tuple[int, ...]) -> "ModelSignature":
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec

    inputs = [ColSpec(kind, name, required=False) for name, kind in columns.items()]
    return ModelSignature(Schema(inputs), Schema([TensorSpec(np.dtype(np.float32), output_shape)]))


def _client(uri: str) -> "MlflowClient":
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for chatty in ("alembic", "mlflow.store.db.utils"):  # every migration of a new database
        logging.getLogger(chatty).setLevel(logging.WARNING)
    if uri.startswith("sqlite:///"):
        os.makedirs(os.path.dirname(uri.removeprefix("sqlite:///")) or ".", exist_ok=True)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)
