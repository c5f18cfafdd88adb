"""The manifests as kubectl would send them: raw files, and what kustomize makes of a folder; the pods that come of them."""

import json
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonpatch import apply_patch

from pipelines.full import parse
from pipelines.recipe import Recipe, load_recipe

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "cluster" / "deploy"
OVERLAYS = sorted(path.name for path in (DEPLOY / "overlays").iterdir())
QUEUED = [name for name in OVERLAYS if name != "cpu-trial"]
JOBS = ["ray_job.yaml", *OVERLAYS]
FOLDERS = ["platform", "store", *(f"overlays/{name}" for name in OVERLAYS)]

Manifest = dict[str, Any]


def raw() -> list[Manifest]:
    """Every manifest as it is written."""
    files = [path for path in DEPLOY.rglob("*.yaml") if path.name != "kustomization.yaml"]
    return [manifest for path in sorted(files) for manifest in yaml.safe_load_all(path.read_text())]


@cache
def rendered(folder: str) -> list[Manifest]:
    """What `kubectl apply -k cluster/deploy/FOLDER` sends."""
    return kustomized(DEPLOY / folder) or built(DEPLOY / folder, [])


def kustomized(folder: Path) -> list[Manifest]:
    """By kustomize; empty where it is not installed."""
    command = ["kubectl", "kustomize"] if shutil.which("kubectl") else ["kustomize", "build"]
    if not shutil.which(command[0]):
        return []
    run = subprocess.run([*command, folder], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return list(yaml.safe_load_all(run.stdout))


def built(folder: Path, before: list[Manifest]) -> list[Manifest]:
    """By ourselves, the few things of kustomize that are used here, so that nothing is left unlooked at where it is not installed."""
    settings = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert set(settings) <= {"apiVersion", "kind", "namespace", "resources", "components", "patches"}
    manifests = list(before)
    for path in (folder / resource for resource in settings.get("resources", [])):
        made = built(path, []) if path.is_dir() else list(yaml.safe_load_all(path.read_text()))
        manifests += json.loads(json.dumps(made))  # what anchors share is no longer shared
    for component in settings.get("components", []):
        manifests = built(folder / component, manifests)
    for patch in settings.get("patches", []):
        operations = yaml.safe_load(patch["patch"])
        here = [manifest["kind"] == patch["target"]["kind"] for manifest in manifests]
        manifests = [apply_patch(m, operations) if hit else m for m, hit in zip(manifests, here, strict=True)]
    for manifest in manifests:
        if "namespace" in settings and manifest["kind"] != "Namespace":
            manifest["metadata"]["namespace"] = settings["namespace"]
    return json.loads(json.dumps(manifests))


def only(kind: str, manifests: list[Manifest]) -> Manifest:
    (found,) = (manifest for manifest in manifests if manifest["kind"] == kind)
    return found


def ray_job(name: str) -> Manifest:
    """Of an overlay, or ray_job.yaml at the top of the repository."""
    if name == "ray_job.yaml":
        return yaml.safe_load((REPOSITORY / name).read_text())
    return only("RayJob", rendered(f"overlays/{name}"))


def recipe_of(job: Manifest) -> Recipe:
    """What the entrypoint of a RayJob asks for, read by the command's own parser."""
    python, script, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert (python, script) == (
        "python",
        "/opt/moca/pipelines/full.py",
    )  # nothing says in which folder the driver starts
    options = parse(arguments)
    assert options.root.startswith("s3://")
    return load_recipe(options.recipe, options.set)


def groups(job: Manifest) -> dict[str, Manifest]:
    """The head and the worker groups of a RayJob."""
    cluster = job["spec"]["rayClusterSpec"]
    return {"head": cluster["headGroupSpec"]} | {group["groupName"]: group for group in cluster["workerGroupSpecs"]}


def pods(manifest: Manifest) -> dict[str, tuple[Manifest, int]]:
    """{name: (template, how many)} of a RayJob, a Deployment, a StatefulSet or a Job; nothing of other kinds."""
    name, spec = manifest["metadata"]["name"], manifest.get("spec", {})
    if manifest["kind"] == "RayJob":
        nodes = {key: (group["template"], group.get("replicas", 1)) for key, group in groups(manifest).items()}
        return {
            f"{name}-{key}": node for key, node in (nodes | {"submitter": (spec["submitterPodTemplate"], 1)}).items()
        }
    if manifest["kind"] in ("Deployment", "StatefulSet", "Job"):
        return {name: (spec["template"], spec.get("replicas", 1))}
    return {}


def container(template: Manifest) -> Manifest:
    """The only one of a pod, beside those that run before it."""
    (found,) = template["spec"]["containers"]
    return found


def quantity(text: str | int) -> float:
    """A Kubernetes quantity as a number: "500m" is 0.5, "1Ki" is 1024."""
    for suffix, factor in {"m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}.items():
        if str(text).endswith(suffix):
            return float(str(text).removesuffix(suffix)) * factor
    return float(text)
