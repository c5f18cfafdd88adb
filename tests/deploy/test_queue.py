"""Kueue admits a job only if every rule here holds; otherwise it waits for ever, without an error."""

from collections import Counter

import pytest

from tests.deploy.manifests import OVERLAYS, QUEUED, Manifest, container, only, pods, quantity, ray_job, rendered


def requested(job: Manifest) -> Counter[str]:
    """What all pods of a job request, as Kueue adds it up: of every pod its containers, or one that runs before them if that is more."""
    total: Counter[str] = Counter()
    for template, count in pods(job).values():
        requests = {key: quantity(value) for key, value in container(template)["resources"]["requests"].items()}
        for earlier in template["spec"].get("initContainers", []):
            for key, value in earlier["resources"]["requests"].items():
                requests[key] = max(requests.get(key, 0), quantity(value))
        for key, value in requests.items():
            total[key] += value * count
    return total


@pytest.mark.parametrize("name", QUEUED)
def test_the_quota_is_what_the_job_requests(name: str) -> None:
    manifests = rendered(f"overlays/{name}")
    (group,) = only("ClusterQueue", manifests)["spec"]["resourceGroups"]
    (flavor,) = group["flavors"]
    quota = {resource["name"]: quantity(resource["nominalQuota"]) for resource in flavor["resources"]}
    assert list(quota) == group["coveredResources"]  # in this order, which is a rule too
    assert quota == pytest.approx(dict(requested(ray_job(name))))


@pytest.mark.parametrize("name", QUEUED)
def test_the_label_leads_from_the_job_to_its_quota(name: str) -> None:
    manifests = rendered(f"overlays/{name}")
    job, local, queue = (only(kind, manifests) for kind in ("RayJob", "LocalQueue", "ClusterQueue"))
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == local["metadata"]["name"]
    assert local["metadata"]["namespace"] == job["metadata"]["namespace"] == "moca"
    assert local["spec"]["clusterQueue"] == queue["metadata"]["name"]
    assert queue["spec"]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "moca"}
    flavors = {f["name"] for group in queue["spec"]["resourceGroups"] for f in group["flavors"]}
    assert flavors == {only("ResourceFlavor", manifests)["metadata"]["name"]}


@pytest.mark.parametrize("name", OVERLAYS)
def test_what_belongs_to_the_cluster_is_in_no_namespace_and_all_else_is_in_ours(name: str) -> None:
    for folder in ("platform", "store", f"overlays/{name}"):
        for manifest in rendered(folder):
            expected = None if manifest["kind"] in ("Namespace", "ResourceFlavor", "ClusterQueue") else "moca"
            assert manifest["metadata"].get("namespace") == expected, manifest["kind"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_what_kueue_asks_of_a_ray_job(name: str) -> None:
    spec = ray_job(name)["spec"]
    assert spec["shutdownAfterJobFinishes"] and "clusterSelector" not in spec
    assert not spec["rayClusterSpec"].get("enableInTreeAutoscaling")
    names = [group["groupName"] for group in spec["rayClusterSpec"]["workerGroupSpecs"]]
    assert len(names) <= 6 and not {"head", "submitter"} & set(names)  # with these two, at most 8 sets of pods
    assert "suspend" not in spec  # Kueue's own: written here, applying again would suspend a running job
