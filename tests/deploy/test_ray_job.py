"""ray_job.yaml and what the overlays make of it say what the code understands and what KubeRay's operator accepts."""

import re
from importlib.metadata import version

import pytest
import yaml

from cluster.placement import LABEL, TRAINING
from tests.deploy.manifests import (
    DEPLOY,
    JOBS,
    OVERLAYS,
    REPOSITORY,
    container,
    groups,
    only,
    pods,
    ray_job,
    recipe_of,
    rendered,
)

DNS1035 = re.compile(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?")  # 47 characters: the operator appends its own


def test_there_is_one_job() -> None:
    """Kustomize reads nothing above its own folder: cp ray_job.yaml cluster/deploy/job/"""
    assert (REPOSITORY / "ray_job.yaml").read_text() == (DEPLOY / "job" / "ray_job.yaml").read_text()


@pytest.mark.parametrize("name", JOBS)
def test_the_entrypoint_is_a_recipe_that_loads(name: str) -> None:
    recipe = recipe_of(ray_job(name))
    if name != "cpu-trial":
        assert (recipe.base.model, recipe.finetune.batch_size) == ("Qwen/Qwen2.5-VL-3B-Instruct", 2048)
        assert recipe.cluster.tokens_per_forward  # without GradCache that batch fits no GPU
    # The operator puts this text into a shell command as it is.
    assert not re.search(r"[;&|<>()$`\\\"'*?\[\]{}~#!\n]", ray_job(name)["spec"]["entrypoint"])


@pytest.mark.parametrize("name", JOBS)
def test_names_are_short_dns_labels(name: str) -> None:
    job = ray_job(name)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    for label in (job["metadata"]["name"], *groups(job)):
        assert DNS1035.fullmatch(label), label


@pytest.mark.parametrize("name", JOBS)
def test_the_rules_of_the_operator_that_no_schema_holds(name: str) -> None:
    spec = ray_job(name)["spec"]
    assert spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] >= 0
    assert "deletionStrategy" not in spec and "clusterSelector" not in spec  # neither goes with what is used here
    assert spec["submissionMode"] == "K8sJobMode"  # the only one with a template for who submits
    assert spec["submitterPodTemplate"]["spec"]["restartPolicy"] in ("Never", "OnFailure")
    assert spec["backoffLimit"] > 0 and spec["activeDeadlineSeconds"] > spec["preRunningDeadlineSeconds"] > 0
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"]["mode"] == "token"
    assert tuple(map(int, cluster["rayVersion"].split(".")[:2])) >= (2, 52)  # from here on Ray knows tokens
    assert not cluster.get("enableInTreeAutoscaling")
    for group in groups(ray_job(name)).values():
        assert "resources" not in group and "labels" not in group["rayStartParams"]
        assert not {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD"} & {v["name"] for v in container(group["template"])["env"]}
    for group in cluster["workerGroupSpecs"]:  # without the autoscaler all three are mandatory, and say the same
        assert group["minReplicas"] == group["replicas"] == group["maxReplicas"] > 0


@pytest.mark.parametrize("name", JOBS)
def test_ray_is_the_version_that_the_image_installs(name: str) -> None:
    pinned = REPOSITORY / "requirements.txt"
    found = re.search(r"^ray(?:\[.*\])?==([\w.]+)", pinned.read_text(), re.MULTILINE) if pinned.exists() else None
    assert ray_job(name)["spec"]["rayClusterSpec"]["rayVersion"] == (found[1] if found else version("ray"))


@pytest.mark.parametrize("name", JOBS)
def test_the_head_works_for_nobody_and_the_others_know_what_they_are_for(name: str) -> None:
    job = ray_job(name)
    recipe, nodes = recipe_of(job), groups(job)
    assert nodes.pop("head")["rayStartParams"] == {"num-cpus": "0"}
    gpus = {
        group: container(node["template"])["resources"]["limits"].get("nvidia.com/gpu") for group, node in nodes.items()
    }
    if recipe.cluster.gpus_per_worker:
        assert [group for group in gpus if gpus[group]] == ["gpu"]
    else:
        assert not any(gpus.values())
        assert [group for group in nodes if nodes[group].get("labels") == {LABEL: TRAINING}] == ["training"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_draining_a_node_waits_for_the_head_alone(name: str) -> None:
    budget = only("PodDisruptionBudget", rendered(f"overlays/{name}"))["spec"]
    wanted = budget["selector"]["matchLabels"].items()
    protected = [
        pod for pod, (template, _) in pods(ray_job(name)).items() if wanted <= template["metadata"]["labels"].items()
    ]
    assert protected == [f"{ray_job(name)['metadata']['name']}-head"]
    assert set(budget) == {"minAvailable", "selector"}  # no other works for pods of a custom resource


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_pod_runs_the_same_image(name: str) -> None:
    templates = [template for template, _ in pods(ray_job(name)).values()]
    images = {c["image"] for t in templates for c in [*t["spec"]["containers"], *t["spec"].get("initContainers", [])]}
    assert len(images) == 1


@pytest.mark.parametrize("name", JOBS)
def test_what_is_written_has_a_place_to_go(name: str) -> None:
    """The file system of the image is read-only: Ray, the caches and temporary files need volumes."""
    for node in groups(ray_job(name)).values():
        ray = container(node["template"])
        mounts = {mount["mountPath"]: mount["name"] for mount in ray["volumeMounts"]}
        volumes = {volume["name"]: volume["emptyDir"] for volume in node["template"]["spec"]["volumes"]}
        assert set(mounts.values()) == set(volumes)
        assert volumes[mounts["/dev/shm"]]["medium"] == "Memory" and "/tmp" in mounts
        environment = {variable["name"]: variable["value"] for variable in ray["env"]}
        for variable in ("MOCA_CACHE", "HF_HOME", "TMPDIR", "HOME"):
            assert any(environment[variable].startswith(path) for path in mounts), variable


@pytest.mark.parametrize("name", JOBS)
def test_the_driver_knows_where_to_track(name: str) -> None:
    variables = yaml.safe_load(ray_job(name)["spec"]["runtimeEnvYAML"])["env_vars"]
    assert variables == {"MLFLOW_TRACKING_URI": "http://mlflow:5000"}  # a root on S3 needs a server
