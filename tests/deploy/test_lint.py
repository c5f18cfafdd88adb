"""checkov, a linter for security, over everything that would be sent to a cluster, the pods of a RayJob among them, and the Dockerfile.

It has an environment of its own, as it pins what we pin too: `make .venv-checkov/installed`.
"""

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.deploy.manifests import DEPLOY, FOLDERS, REPOSITORY, Manifest, pods, rendered

CHECKOV = REPOSITORY / ".venv-checkov" / "bin" / "checkov"

# Every check that is left out, and why.
LEFT_OUT = {
    "CKV_K8S_43": "images by digest: ours have none before you build them; tags are exact, and kustomize's `images:` takes a digest",
    "CKV_K8S_15": "always asking the registry: tags are exact, and kind's nodes have the image but no registry",
    "CKV_K8S_35": "secrets as files: boto3, MLflow and PostgreSQL's library read them from the environment",
    "CKV_DOCKER_7": "a tag for the base: it has one, in the argument PYTHON, where checkov does not look",
    "CKV_DOCKER_2": "HEALTHCHECK: Kubernetes does not read it; probes are in the manifests",
}
LEFT_OUT_FOR_RAY = {
    "CKV_K8S_8": "liveness: the operator adds Ray's own probes; who submits ends by itself",
    "CKV_K8S_9": "readiness: the same",
}


def ray_pods(job: Manifest) -> list[Manifest]:
    """The pods of a RayJob as such, which checkov does not find in a custom resource."""
    left_out = {f"checkov.io/skip{i}": f"{check}={why}" for i, (check, why) in enumerate(LEFT_OUT_FOR_RAY.items())}
    return [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": "moca", "annotations": left_out, **template["metadata"]},
            "spec": template["spec"],
        }
        for name, (template, _) in pods(job).items()
    ]


def failures(folder: Path) -> tuple[int, list[str]]:
    """(how many checks passed, what failed)"""
    frameworks = ["--framework", "kubernetes", "dockerfile", "secrets"]
    quietly = ["--skip-download", "--output", "json", "--skip-check", ",".join(LEFT_OUT)]
    command = [str(CHECKOV), "--directory", str(folder), *frameworks, *quietly]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    reports = json.loads(run.stdout)
    reports = reports if isinstance(reports, list) else [reports]
    failed = [check for report in reports for check in report["results"]["failed_checks"]]
    passed = sum(report["summary"]["passed"] for report in reports)
    assert sum(report["summary"]["parsing_errors"] for report in reports) == 0
    return passed, [f"{c['check_id']} {c['check_name']}: {c['resource']}" for c in failed]


@pytest.mark.skipif(not CHECKOV.exists(), reason="checkov is not here: make .venv-checkov/installed")
def test_checkov_finds_nothing(tmp_path: Path) -> None:
    for folder in FOLDERS:
        manifests = rendered(folder)
        made = [pod for manifest in manifests if manifest["kind"] == "RayJob" for pod in ray_pods(manifest)]
        (tmp_path / f"{Path(folder).name}.yaml").write_text(yaml.safe_dump_all([*manifests, *made]))
    (tmp_path / "Dockerfile").write_text((DEPLOY / "Dockerfile").read_text())
    passed, failed = failures(tmp_path)
    assert failed == []
    assert passed > 1000


@pytest.mark.skipif(not CHECKOV.exists(), reason="checkov is not here: make .venv-checkov/installed")
def test_checkov_finds_a_pod_of_a_job_that_may_do_anything(tmp_path: Path) -> None:
    (job,) = (manifest for manifest in rendered("overlays/cpu-trial") if manifest["kind"] == "RayJob")
    head = ray_pods(job)[0]
    head["spec"] = {**head["spec"], "hostNetwork": True, "securityContext": {}}
    (tmp_path / "head.yaml").write_text(yaml.safe_dump(head))
    _, failed = failures(tmp_path)
    assert {"CKV_K8S_19", "CKV_K8S_31", "CKV_K8S_40"} <= {failure.split()[0] for failure in failed}
