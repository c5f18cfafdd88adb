"""What an engine leaves in a checkpoint folder, and how to read it in any process, without its workers."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MANIFEST = "engine.json"  # written last: its presence means complete
TORCH_FILE = "torch.pt"
ZERO_TAG = "zero"


def consolidate(directory: str) -> dict[str, Tensor]:
    """Trained weights and buffers of a checkpoint of either engine, on CPU, named as in `module.state_dict()`.

    Floating point as fp32. Tied parameters appear under each of their names; what was frozen is not in a checkpoint.
    Raises ValueError if the folder holds no complete one.
    """
    manifest = read_manifest(directory)
    if manifest["kind"] == "torch":
        weights = torch.load(Path(directory, TORCH_FILE), map_location="cpu", weights_only=True)["module"]
    else:
        _no_accelerator_needed()
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        with contextlib.redirect_stdout(io.StringIO()):  # it narrates
            weights = get_fp32_state_dict_from_zero_checkpoint(directory, tag=ZERO_TAG)
    return {name: w.detach().float() if w.is_floating_point() else w.detach() for name, w in weights.items()}


def write_manifest(directory: str, manifest: dict[str, Any]) -> None:
    """Mark the checkpoint in `directory` as complete."""
    unfinished = Path(directory, f"{MANIFEST}.unfinished")
    unfinished.write_text(json.dumps(manifest, indent=1))
    os.replace(unfinished, Path(directory, MANIFEST))


def read_manifest(directory: str, kind: str | None = None) -> dict[str, Any]:
    """The manifest of a complete checkpoint. ValueError if there is none, or if another kind of engine wrote it."""
    path = Path(directory, MANIFEST)
    if not path.is_file():
        raise ValueError(f"{directory} holds no complete checkpoint: {MANIFEST} is missing")
    manifest = json.loads(path.read_text())
    if kind is not None and manifest["kind"] != kind:
        raise ValueError(
            f"{directory} was saved by a {manifest['kind']!r} engine and cannot continue in a {kind!r} one"
        )
    return manifest


def reshard_zero(directory: str) -> str:
    """The same ZeRO checkpoint in DeepSpeed's universal form, which any number of ranks can load.

    Converted once per node, into its cache, which the caller clears; the original stays untouched. Returns the folder
    to load with tag ZERO_TAG.
    """
    files = sorted(Path(directory, ZERO_TAG).iterdir())
    identity = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(repr((os.path.abspath(directory), identity)).encode()).hexdigest()[:32]

    def convert(folder: str) -> None:
        module = "deepspeed.checkpoint.ds_to_universal"  # a program of its own: it forks, which a worker must not
        source, target = str(Path(directory, ZERO_TAG)), str(Path(folder, ZERO_TAG))
        command = [sys.executable, "-m", module, "--input_folder", source, "--output_folder", target]
        command += ["--inject_missing_state", "--num_extract_workers", "1", "--num_merge_workers", "1"]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=folder)
        if done.returncode:
            raise RuntimeError(f"cannot convert the checkpoint {directory} for other ranks: {done.stderr[-2000:]}")
        shutil.rmtree(Path(target, "tmp"), ignore_errors=True)

    from cluster.storage import build_once  # here, as TorchEngine needs torch alone

    return build_once(f"universal-{key}", convert)


def _no_accelerator_needed() -> None:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else deepspeed looks for one, with a warning
