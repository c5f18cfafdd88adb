"""MLflow on a SQLite file, without a server."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.tracking import Tracker, attach, open_tracker, tracking_uri


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tracking")


@pytest.fixture(scope="module")
def uri(root: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return tracking_uri(str(root), None)


@pytest.fixture(scope="module")
def tracker(root: Path, uri: str) -> Tracker:
    return open_tracker(uri, "moca", str(root / "artifacts"))


def test_where_tracking_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri("/data/moca", None) == "sqlite:////data/moca/mlflow.db"
    assert tracking_uri("s3://bucket/moca", "http://mlflow:5000") == "http://mlflow:5000"
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI"):
        tracking_uri("s3://bucket/moca", None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://other:5000")
    assert tracking_uri("s3://bucket/moca", None) == "http://other:5000"


@pytest.mark.parametrize("address", ["http://me:hidden@mlflow:5000", "postgresql+psycopg2://me:hidden@database/mlflow"])
def test_a_password_in_the_address_is_refused_and_not_repeated(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    for configured in (address, None):
        with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD") as refused:
            tracking_uri("s3://bucket/moca", configured)
        assert "hidden" not in str(refused.value)


def test_a_step_lies_below_its_pipeline(tracker: Tracker) -> None:
    pipeline = tracker.start_run("pipeline")
    step = tracker.start_run("pretrain", parent=pipeline, tags={"fingerprint": "abc"})
    step.log_params({f"optimizer.p{i}": i for i in range(150)})  # more than one request may hold
    step.log_dataset("corpus", "s3://bucket/corpus", "0123456789abcdef" * 4, "pretrain")
    step.finish("FINISHED")
    seen = tracker.client.get_run(step.run_id)
    assert seen.data.tags["mlflow.parentRunId"] == pipeline.run_id
    assert seen.data.tags["fingerprint"] == "abc"
    assert seen.info.run_name == "pretrain" and seen.info.status == "FINISHED"
    assert len(seen.data.params) == 150 and seen.data.params["optimizer.p7"] == "7"
    (entry,) = seen.inputs.dataset_inputs
    assert entry.dataset.name == "corpus" and entry.dataset.digest == ("0123456789abcdef" * 4)[:36]
    assert "s3://bucket/corpus" in entry.dataset.source
    assert [(tag.key, tag.value) for tag in entry.tags] == [("mlflow.data.context", "pretrain")]
    assert tracker.client.get_run(pipeline.run_id).info.status == "RUNNING"
    with pytest.raises(ValueError, match="DONE"):
        pipeline.finish("DONE")
    pipeline.finish("FAILED")
    assert tracker.client.get_run(pipeline.run_id).info.status == "FAILED"


def test_what_is_left_running_below_a_run_is_killed(tracker: Tracker) -> None:
    study = tracker.start_run("study")
    inner = tracker.start_run("run", parent=study)
    done, open_step = tracker.start_run("corpus", parent=inner), tracker.start_run("pretrain", parent=inner)
    other = tracker.start_run("another pipeline")
    done.finish("FINISHED")
    tracker.kill_below(study.run_id)
    seen = [tracker.client.get_run(run.run_id).info.status for run in (study, inner, done, open_step, other)]
    assert seen == ["RUNNING", "KILLED", "FINISHED", "KILLED", "RUNNING"]
    study.finish("KILLED")
    other.finish("FINISHED")


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("mixture/mmc4 data/*.jsonl.gz", "mixture/mmc4 data/_.jsonl.gz"),
        ("pairs/R&D (2)@abc", "pairs/R_D _2__abc"),
        ("pairs/Größe", "pairs/Größe"),
        ("pairs//a/../b", "pairs/b"),
        ("../up", "up"),
        ("", "_"),
        ("x" * 400, "x" * 250),
    ],
)
def test_what_users_call_their_data_is_a_name_that_mlflow_takes(tracker: Tracker, name: str, kept: str) -> None:
    run = tracker.start_run("names")
    run.log_metrics({name: 1.0})
    run.log_params({name: 2})
    data = run.client.get_run(run.run_id).data
    assert data.metrics == {kept: 1.0} and data.params == {kept: "2"}


@pytest.mark.parametrize("where", ["hf://datasets/owner/name", "s3://bucket/pairs", "builtin", "/data/pairs.jsonl"])
def test_data_is_recorded_without_being_read(tracker: Tracker, where: str) -> None:
    run = tracker.start_run("data")
    digest = hashlib.sha256(where.encode()).hexdigest()
    run.log_dataset("pairs", where, digest, "train")
    (recorded,) = run.client.get_run(run.run_id).inputs.dataset_inputs
    assert where in recorded.dataset.source and recorded.dataset.digest == digest[:36]


def test_what_could_not_be_sent_does_not_stop_a_run_from_ending(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tracker.start_run("cut off")

    def unreachable(*arguments: object, **named: object) -> None:
        raise OSError("no route to host")

    with monkeypatch.context() as patch:
        patch.setattr(run.client, "log_batch", unreachable)
        with pytest.raises(OSError, match="no route"):
            run.log_metrics({"loss": 1.0})
        run.finish("FAILED")
    assert run.client.get_run(run.run_id).info.status == "FAILED"


def test_another_process_attaches_and_buffers(tracker: Tracker, uri: str, tmp_path: Path) -> None:
    run = tracker.start_run("workers")
    program = """
import sys
from cluster.tracking import attach
run = attach(sys.argv[1], sys.argv[2])
for step in range(250):
    run.log_metrics({"loss": float(step)}, step)
before = len(run.client.get_metric_history(run.run_id, "loss"))
run.flush()
print(before, len(run.client.get_metric_history(run.run_id, "loss")))
"""
    repository = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", program, uri, run.run_id],
        env={**os.environ, "PYTHONPATH": repository},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    before, after = map(int, done.stdout.split())
    assert before < 250  # it did not write 250 times
    assert after == 250
    assert max(p.step for p in run.client.get_metric_history(run.run_id, "loss")) == 249
    assert os.listdir(tmp_path) == []  # no database beside the worker


def test_a_buffer_does_not_wait_longer_than_its_time(tracker: Tracker, uri: str) -> None:
    attached = attach(uri, tracker.start_run("slow").run_id)
    attached.log_metrics({"loss": 1.0}, 0)
    assert attached.client.get_metric_history(attached.run_id, "loss") == []
    attached._flushed -= 3.0  # three seconds later
    attached.log_metrics({"loss": 2.0}, 1)
    assert len(attached.client.get_metric_history(attached.run_id, "loss")) == 2


def write_served_model(folder: Path) -> tuple[str, str]:
    """(code, weights) of a model that multiplies the column `value` by what its weights say."""
    (folder / "weights").mkdir(exist_ok=True)
    code = folder / "code.py"
    code.write_text(
        "import mlflow, pathlib\n"
        "class Scale(mlflow.pyfunc.PythonModel):\n"
        "    def load_context(self, context):\n"
        "        self.factor = int(pathlib.Path(context.artifacts['model'], 'factor').read_text())\n"
        "    def predict(self, context, model_input, params=None):\n"
        "        return model_input[['value']].to_numpy('float32') * self.factor\n"
        "mlflow.models.set_model(Scale())\n"
    )
    return str(code), str(folder / "weights")


def test_models_are_logged_and_registered(
    tracker: Tracker, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every version loads by its own address, the newest by the alias; nothing lands beside the caller."""
    import mlflow
    import pandas as pd

    code, weights = write_served_model(tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    run, addresses = tracker.start_run("export"), []
    for number, factor in (("1", "3"), ("2", "5")):
        Path(weights, "factor").write_text(factor)
        addresses.append(run.log_model("m", code, weights, ["torch"], {"value": "long"}, (-1, 1)))
        assert run.register_model("m", addresses[-1], "newest", "what it is") == number
    run.log_artifact(f"{weights}/factor")
    run.log_artifact(f"{weights}/factor", "moments")
    run.finish("FINISHED")
    assert os.listdir(work) == []
    newest = tracker.client.get_model_version_by_alias("m", "newest")
    assert (str(newest.version), newest.description, newest.run_id) == ("2", "what it is", run.run_id)
    assert tracker.client.get_model_version("m", "1").aliases == []
    seen = tracker.client.get_run(run.run_id)
    assert {f"models:/{output.model_id}" for output in seen.outputs.model_outputs} == set(addresses)
    assert [file.path for file in tracker.client.list_artifacts(run.run_id)] == ["factor", "moments"]
    assert [file.path for file in tracker.client.list_artifacts(run.run_id, "moments")] == ["moments/factor"]

    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    table = pd.DataFrame({"value": [1, 2]})
    assert mlflow.pyfunc.load_model(addresses[0]).predict(table).tolist() == [[3], [6]]
    loaded = mlflow.pyfunc.load_model("models:/m@newest")
    assert loaded.predict(table).tolist() == [[5], [10]]
    assert loaded.metadata.signature.outputs.to_dict()[0]["tensor-spec"]["shape"] == (-1, 1)
    with pytest.raises(mlflow.MlflowException, match="value"):
        loaded.predict(pd.DataFrame({"value": ["no number"]}))


def test_an_experiment_is_found_again(tracker: Tracker, uri: str, root: Path) -> None:
    assert open_tracker(uri, "moca", str(root / "artifacts")).experiment_id == tracker.experiment_id
    other = open_tracker(uri, "other", str(root / "artifacts"))
    assert other.experiment_id != tracker.experiment_id
    other.client.delete_experiment(other.experiment_id)
    with pytest.raises(ValueError, match=r"'other'.*deleted"):
        open_tracker(uri, "other", str(root / "artifacts"))
