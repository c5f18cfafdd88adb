"""ray_job.yaml says what the code understands, and what KubeRay accepts; the paper's recipes load."""

import math
import re
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.full import main, parse
from pipelines.recipe import Recipe, load_recipe

REPOSITORY = Path(__file__).parents[2]
CRD = REPOSITORY.parent / "shared" / "schemas" / "ray.io_rayjobs.yaml"
DNS1035 = re.compile(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?")  # 47 characters: the operator appends its own


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    return yaml.safe_load((REPOSITORY / "ray_job.yaml").read_text())


@pytest.fixture(scope="module")
def recipe(job: dict[str, Any]) -> Recipe:
    """What the entrypoint asks for, read by the command's own parser."""
    python, script, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert python == "python"
    assert script.endswith("/pipelines/full.py")
    assert script.startswith("/")  # nothing says in which folder the driver starts
    options = parse(arguments)
    assert options.root.startswith("s3://")
    return load_recipe(options.recipe, options.set)


def groups(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    return {"head": cluster["headGroupSpec"]} | {group["groupName"]: group for group in cluster["workerGroupSpecs"]}


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = group["template"]["spec"]["containers"]
    return only


@pytest.mark.skipif(not CRD.exists(), reason="the KubeRay schema is not here")
def test_the_schema_of_kuberay_knows_every_key(job: dict[str, Any]) -> None:
    from jsonschema import Draft7Validator

    versions = yaml.load(CRD.read_text(), yaml.CSafeLoader)["spec"]["versions"]  # a megabyte
    (schema,) = (v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == job["apiVersion"].split("/")[1])
    schema["properties"]["metadata"] = {"type": "object"}
    validator = Draft7Validator(closed(schema))
    assert [f"{'/'.join(map(str, e.absolute_path))}: {e.message}" for e in validator.iter_errors(job)] == []
    job_with_typo = {**job, "spec": {**job["spec"], "backofLimit": 1}}
    assert not validator.is_valid(job_with_typo)


def closed(schema: Any) -> Any:
    """A Kubernetes schema as JSON Schema in which an unknown key is an error."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    result = {key: closed(value) for key, value in schema.items() if key not in ("format", "default", "nullable")}
    if "properties" in result and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    return result


def test_names_are_short_dns_labels(job: dict[str, Any]) -> None:
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    for name in (job["metadata"]["name"], *groups(job)):
        assert DNS1035.fullmatch(name), name


def test_the_rules_of_the_operator_that_no_schema_holds(job: dict[str, Any]) -> None:
    spec = job["spec"]
    assert "ttlSecondsAfterFinished" not in spec or spec["shutdownAfterJobFinishes"]
    assert not (spec.get("shutdownAfterJobFinishes") and "deletionStrategy" in spec)
    assert not (spec.get("backoffLimit") and "clusterSelector" in spec)
    assert spec["submissionMode"] == "K8sJobMode"
    assert spec["rayClusterSpec"]["authOptions"]["mode"] == "token"
    assert not spec["rayClusterSpec"].get("enableInTreeAutoscaling")
    for name, group in groups(job).items():
        if name != "head":  # without the autoscaler all three are mandatory, and say the same
            assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]
        assert "resources" not in group["rayStartParams"]  # not beside the container's own


def test_ray_is_the_version_that_the_image_installs(job: dict[str, Any]) -> None:
    pinned = REPOSITORY / "requirements.txt"
    found = re.search(r"^ray(?:\[.*\])?==([\w.]+)", pinned.read_text(), re.MULTILINE) if pinned.exists() else None
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == (found[1] if found else version("ray"))


def test_the_cluster_holds_exactly_the_workers_of_the_recipe(job: dict[str, Any], recipe: Recipe) -> None:
    gpu = groups(job)["gpu"]
    limits = container(gpu)["resources"]["limits"]
    assert recipe.cluster.gpus_per_worker == 1
    assert gpu["replicas"] * int(limits["nvidia.com/gpu"]) == recipe.cluster.num_workers
    training_cpus = int(limits["nvidia.com/gpu"]) * recipe.cluster.cpus_per_worker
    assert training_cpus <= int(limits["cpu"]) / 2  # the stream in front of training needs CPUs of the same node
    assert groups(job)["head"]["rayStartParams"]["num-cpus"] == "0"


def test_every_node_has_image_credentials_scratch_and_shared_memory(job: dict[str, Any]) -> None:
    assert len({container(group)["image"] for group in groups(job).values()}) == 1
    for group in groups(job).values():
        node = container(group)
        assert [source["secretRef"]["name"] for source in node["envFrom"]] == ["moca-s3"]
        assert node["resources"]["requests"] == node["resources"]["limits"]
        mounts = {mount["mountPath"]: mount["name"] for mount in node["volumeMounts"]}
        volumes = {volume["name"]: volume["emptyDir"] for volume in group["template"]["spec"]["volumes"]}
        assert volumes[mounts["/dev/shm"]]["medium"] == "Memory"
        environment = {variable["name"]: variable["value"] for variable in node["env"]}
        for name in ("MOCA_CACHE", "HF_HOME", "TMPDIR"):
            assert any(environment[name].startswith(path) for path in mounts), name


def test_the_environment_says_where_to_track_and_holds_no_secret(job: dict[str, Any]) -> None:
    variables = yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]
    assert variables["MLFLOW_TRACKING_URI"].startswith("http")  # a root on S3 needs a server
    assert not [line for line in yaml.safe_dump(job).splitlines() if re.search(r"(SECRET|ACCESS_KEY|TOKEN)\w*:", line)]


def test_the_image_has_the_code_where_the_entrypoint_looks(job: dict[str, Any]) -> None:
    lines = (REPOSITORY / "cluster" / "deploy" / "Dockerfile").read_text().splitlines()
    (folder,) = (line.split()[1] for line in lines if line.startswith("WORKDIR"))
    copied = {name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]}
    script = Path(shlex.split(job["spec"]["entrypoint"])[1]).relative_to(folder)
    assert (REPOSITORY / script).is_file() and script.parts[0] in copied
    assert {"moca_core", "cluster", "pipelines", "requirements.txt", "pyproject.toml"} <= copied
    (base,) = (line.split()[1] for line in lines if line.startswith("FROM"))
    assert base.startswith("python:3.11")


@pytest.mark.parametrize(("name", "ratio_text", "ratio_image"), [("moca_3b", 0.4, 0.5), ("moca_7b", 0.6, 0.6)])
def test_the_papers_numbers(name: str, ratio_text: float, ratio_image: float) -> None:
    recipe = load_recipe(name, [])
    pretrain, finetune = recipe.pretrain, recipe.finetune
    assert (pretrain.mlm_ratio, pretrain.mae_ratio, pretrain.mae_weight) == (ratio_text, ratio_image, 0.5)
    assert (pretrain.learning_rate, pretrain.steps, recipe.pack.max_tokens) == (2e-6, 3311, 2048)
    assert (finetune.learning_rate, finetune.batch_size, finetune.num_negatives) == (1e-5, 2048, 2)
    assert math.isclose(finetune.loss.temperature, 0.03)
    assert (recipe.base.min_image_px, recipe.base.max_image_px) == (256 * 784, 1024 * 784)
    assert recipe.base.on_hub() and name[-2:].upper() in recipe.base.model


@pytest.mark.parametrize("workers", [8, 16, 32, 64])
def test_the_papers_recipes_run_on_nodes_of_eight_gpus(workers: int) -> None:
    assert load_recipe("moca_3b", [f"cluster.num_workers={workers}"]).cluster.num_workers == workers


def test_more_workers_than_rows_of_a_step_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rows_per_step=64 .*num_workers=96"):
        load_recipe("moca_3b", ["cluster.num_workers=96"])


def test_a_placeholder_for_a_bucket_is_an_error_before_anything_runs(
    s3: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert main(["--recipe", "moca_3b", "--root", "s3://YOUR-BUCKET/runs", "--dry-run"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and "bucket" in printed.err.lower()
    assert "plan for" not in printed.out
