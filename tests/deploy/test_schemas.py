"""Every manifest against the schemas of Kubernetes, KubeRay and Kueue, where an unknown key is an error."""

from functools import cache
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from tests.deploy.manifests import (
    DEPLOY,
    FOLDERS,
    JOBS,
    QUEUED,
    REPOSITORY,
    Manifest,
    built,
    kustomized,
    only,
    pods,
    raw,
    ray_job,
    rendered,
)

KUBERNETES = "1.37"
RESOURCE_DEFINITIONS = REPOSITORY.parent / "shared" / "schemas"  # of KubeRay and Kueue, where they are

NAME = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}
QUANTITY = {"type": ["integer", "string"], "pattern": r"^[0-9]+(\.[0-9]+)?(m|[KMGT]i?)?$"}


def exactly(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def some(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


# What is used here of Kueue's v1beta2, in our own words: its resource definitions were read, but no package carries them.
QUOTAS = some(exactly(name={"type": "string"}, nominalQuota=QUANTITY))
RESOURCE_GROUP = exactly(coveredResources=some({"type": "string"}), flavors=some(exactly(name=NAME, resources=QUOTAS)))
LABELS = {"type": "object", "additionalProperties": {"type": "string"}}
KUEUE = {
    "ResourceFlavor": None,
    "ClusterQueue": exactly(namespaceSelector=exactly(matchLabels=LABELS), resourceGroups=some(RESOURCE_GROUP)),
    "LocalQueue": exactly(clusterQueue=NAME),
}


@pytest.fixture(scope="module", autouse=True)
def definitions_are_read_once() -> None:
    import kubernetes_validate.utils as kubernetes

    kubernetes.schema_contents = cache(kubernetes.schema_contents)


def strictly(manifest: Manifest) -> None:
    """Raises ValidationError for a kind, a key or a type that Kubernetes does not know."""
    import kubernetes_validate

    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def builtin(manifests: list[Manifest]) -> list[Manifest]:
    return [m for m in manifests if not m["apiVersion"].startswith(("ray.io/", "kueue.x-k8s.io/"))]


@pytest.mark.parametrize("folder", FOLDERS)
def test_kustomize_makes_of_a_folder_what_we_take_it_for(folder: str) -> None:
    def in_order(manifests: list[Manifest]) -> list[Manifest]:
        return sorted(manifests, key=lambda manifest: (manifest["kind"], manifest["metadata"]["name"]))

    if not (made := kustomized(DEPLOY / folder)):
        pytest.skip("neither kubectl nor kustomize is installed")
    assert in_order(made) == in_order(built(DEPLOY / folder, []))


@pytest.mark.parametrize("folder", ["as written", *FOLDERS])
def test_kubernetes_knows_every_key_of_its_kinds(folder: str) -> None:
    manifests = raw() if folder == "as written" else rendered(folder)
    assert builtin(manifests)
    for manifest in builtin(manifests):
        strictly(manifest)


@pytest.mark.parametrize("name", JOBS)
def test_kubernetes_knows_every_key_of_the_pods_of_a_job(name: str) -> None:
    """Also without KubeRay's resource definition, which holds the same again."""
    for pod, (template, _) in pods(ray_job(name)).items():
        strictly(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": pod} | template["metadata"],
                "spec": template["spec"],
            }
        )


def test_a_typo_is_found() -> None:
    import kubernetes_validate

    manifest = only("Deployment", raw())
    manifest["spec"]["template"]["spec"]["containers"][0]["imagePullPolice"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError, match="imagePullPolice"):
        strictly(manifest)


@cache
def definition(group: str, plural: str, version: str) -> Draft7Validator:
    """The schema of a custom resource. Skips the test where it is not there."""
    file = RESOURCE_DEFINITIONS / f"{group}_{plural}.yaml"
    if not file.exists():
        pytest.skip(f"no {file.name} beside the repository")
    versions = yaml.load(file.read_text(), yaml.CSafeLoader)["spec"]["versions"]  # a megabyte
    (schema,) = (v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == version)
    schema["properties"]["metadata"] = {"type": "object"}
    return Draft7Validator(closed(schema))


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


def problems(validator: Draft7Validator, manifest: Manifest) -> list[str]:
    return [f"{'/'.join(map(str, e.absolute_path))}: {e.message}" for e in validator.iter_errors(manifest)]


@pytest.mark.parametrize("name", JOBS)
def test_kuberay_knows_every_key_of_a_job(name: str) -> None:
    job, validator = ray_job(name), definition("ray.io", "rayjobs", "v1")
    assert problems(validator, job) == []
    assert problems(validator, {**job, "spec": {**job["spec"], "backofLimit": 1}})


@pytest.mark.parametrize("kind", KUEUE)
@pytest.mark.parametrize("name", QUEUED)
def test_kueue_knows_every_key_of_a_queue(name: str, kind: str) -> None:
    queue = only(kind, rendered(f"overlays/{name}"))
    assert queue["apiVersion"] == "kueue.x-k8s.io/v1beta2"
    assert set(queue) == {"apiVersion", "kind", "metadata"} | ({"spec"} if KUEUE[kind] else set())
    if KUEUE[kind]:
        assert problems(Draft7Validator(KUEUE[kind]), queue["spec"]) == []


@pytest.mark.parametrize("kind", KUEUE)
def test_kueues_own_definitions_say_so_too(kind: str) -> None:
    validator = definition("kueue.x-k8s.io", f"{kind.lower()}s", "v1beta2")
    for name in QUEUED:
        assert problems(validator, only(kind, rendered(f"overlays/{name}"))) == []
