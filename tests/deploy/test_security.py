"""No secret is written down, no pod has rights it does not need, and nothing is reachable that nobody asked for."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.deploy.manifests import (
    DEPLOY,
    FOLDERS,
    JOBS,
    REPOSITORY,
    Manifest,
    container,
    kustomized,
    pods,
    raw,
    ray_job,
    rendered,
)

SECRETS = ["moca-s3", "moca-tracking", "moca-mlflow"]
SECRET = re.compile(r"(?i)(secret|password|token|access_?key|credential)")


def everything(folder: str) -> list[Manifest]:
    return [ray_job(folder)] if folder == "ray_job.yaml" else rendered(folder)


@pytest.mark.parametrize("folder", ["ray_job.yaml", *FOLDERS])
def test_no_manifest_holds_a_secret(folder: str) -> None:
    assert "Secret" not in {manifest["kind"] for manifest in everything(folder)}
    for manifest in everything(folder):
        for name, (template, _) in pods(manifest).items():
            for one in [*template["spec"]["containers"], *template["spec"].get("initContainers", [])]:
                for variable in one.get("env", []):
                    if SECRET.search(variable["name"]):
                        assert "secretKeyRef" in variable["valueFrom"], f"{name}: {variable['name']}"
                    assert not re.search(r"://[^/]*:[^/]*@", variable.get("value", "")), f"{name}: {variable['name']}"
                for source in one.get("envFrom", []):
                    assert set(source) == {"secretRef"}
        text = manifest.get("spec", {}).get("runtimeEnvYAML", "") + str(manifest.get("data", ""))
        assert not SECRET.search(text.replace("basic_auth", "")), manifest["metadata"]["name"]


def test_the_files_of_secrets_are_examples_without_values_and_the_real_ones_are_ignored(tmp_path: Path) -> None:
    """What the user fills in becomes the secrets that the pods name, with the keys that they name."""
    folder = DEPLOY / "secrets"
    tracked = subprocess.run(
        ["git", "ls-files", folder], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    assert not [file for file in tracked.split() if file.endswith(".env")]
    (tmp_path / "kustomization.yaml").write_text((folder / "kustomization.yaml").read_text())
    for example in folder.glob("*.env.example"):
        keys = dict(line.split("=", 1) for line in example.read_text().splitlines() if line and line[0] != "#")
        assert [key for key, value in keys.items() if SECRET.search(key) and value] == []
        real = folder / example.stem
        ignored = subprocess.run(["git", "check-ignore", "--quiet", real], cwd=REPOSITORY)
        assert ignored.returncode == 0, real
        (tmp_path / example.stem).write_text("".join(f"{key}={value or 'a-value'}\n" for key, value in keys.items()))
    if not (secrets := kustomized(tmp_path)):
        pytest.skip("neither kubectl nor kustomize is installed")
    made = {secret["metadata"]["name"]: set(secret["data"]) for secret in secrets}
    assert sorted(made) == sorted(SECRETS)
    named: set[str] = set()
    for manifest in raw():
        for template, _ in pods(manifest).values():
            named |= {
                s["secretRef"]["name"]
                for s in container(template).get("envFrom", [])
                if not s["secretRef"].get("optional")
            }
            for variable in container(template).get("env", []):
                if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                    assert reference["key"] in made[reference["name"]]
                    named.add(reference["name"])
    assert named == set(made)


@pytest.mark.parametrize("folder", ["ray_job.yaml", *FOLDERS])
def test_pods_are_as_the_namespace_demands(folder: str) -> None:
    """Kubernetes' Pod Security Standard `restricted`, and more: a read-only file system, no token, no address of the node."""
    for manifest in everything(folder):
        for name, (template, _) in pods(manifest).items():
            spec, user = template["spec"], template["spec"]["securityContext"]
            assert user["runAsNonRoot"] is True and user["runAsUser"] >= 10000, name
            assert user["seccompProfile"] == {"type": "RuntimeDefault"}, name
            assert spec["automountServiceAccountToken"] is False, name
            assert not {"hostNetwork", "hostPID", "hostIPC", "serviceAccountName"} & set(spec), name
            assert all(set(v) & {"emptyDir", "configMap"} for v in spec.get("volumes", [])), name
            for one in [*spec["containers"], *spec.get("initContainers", [])]:
                assert one["securityContext"] == {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                }, name
                assert "hostPort" not in str(one.get("ports", [])), name


def test_the_user_of_the_image_is_that_of_its_pods() -> None:
    users = set(re.findall(r"^USER (\d+)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE))
    ours = {
        str(template["spec"]["securityContext"]["runAsUser"])
        for manifest in raw()
        for template, _ in pods(manifest).values()
        if container(template)["image"].startswith("registry.example/")
    }
    assert users == ours == {"10001"}


def allowed(policies: list[Manifest]) -> set[tuple[str, str, int | None]]:
    """(from, to, port) by app name that policies let through on both sides; None: every port."""

    def apps(peers: list[Manifest]) -> set[str]:
        found: set[str] = set()
        for peer in peers:
            selector = peer.get("podSelector", {})
            found |= {
                value for key, value in selector.get("matchLabels", {}).items() if key == "app.kubernetes.io/name"
            }
            found |= {value for rule in selector.get("matchExpressions", []) for value in rule["values"]}
            found |= {"the internet"} if "ipBlock" in peer else set()
        return found

    sides: dict[str, set] = {"ingress": set(), "egress": set()}
    for policy in policies:
        for side, peers in (("ingress", "from"), ("egress", "to")):
            for rule in policy["spec"].get(side, []):
                for ours in apps([{"podSelector": policy["spec"]["podSelector"]}]):
                    for other in apps(rule[peers]):
                        ends = (other, ours) if side == "ingress" else (ours, other)
                        sides[side] |= {(*ends, port) for port in [p["port"] for p in rule.get("ports", [])] or [None]}
    outside = {way for way in sides["egress"] if way[1] == "the internet"}
    outside |= {way for way in sides["ingress"] if way[0] == "kuberay-operator"}  # of another namespace
    return (sides["ingress"] & sides["egress"]) | outside


@pytest.mark.parametrize("name", [job for job in JOBS if job != "ray_job.yaml"])
def test_who_may_talk_to_whom(name: str) -> None:
    policies = [
        m
        for folder in ("platform", "store", f"overlays/{name}")
        for m in rendered(folder)
        if m["kind"] == "NetworkPolicy"
    ]
    (nothing,) = (p["spec"] for p in policies if p["metadata"]["name"] == "deny-all")
    assert nothing == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert allowed(policies) == {
        ("moca", "moca", None),
        ("kuberay-operator", "moca", 8265),
        ("moca", "mlflow", 5000),
        ("mlflow", "postgres", 5432),
        ("moca", "store", 8333),
        ("mlflow", "store", 8333),
        ("bucket", "store", 8333),
        ("moca", "the internet", 443),
        ("mlflow", "the internet", 443),
    }
    for manifest in [m for folder in ("platform", "store", f"overlays/{name}") for m in rendered(folder)]:
        for pod, (template, _) in pods(manifest).items():
            app = template["metadata"]["labels"]["app.kubernetes.io/name"]
            assert app in {end for way in allowed(policies) for end in way[:2]}, pod


def test_mlflow_asks_for_a_password_and_answers_to_its_own_name() -> None:
    (server,) = (container(t) for m in rendered("platform") for name, (t, _) in pods(m).items() if name == "mlflow")
    assert server["args"][:3] == ["server", "--app-name", "basic-auth"]
    variables = {variable["name"]: variable.get("value") for variable in server["env"]}
    job = yaml.safe_load(ray_job("ray_job.yaml")["spec"]["runtimeEnvYAML"])["env_vars"]["MLFLOW_TRACKING_URI"]
    assert job.removeprefix("http://") in variables["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    assert "*" not in variables["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
