"""Importing the package starts nothing and loads nothing heavy."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("storage", ("ray", "torch", "mlflow", "s3fs", "deepspeed")),
        ("tracking", ("ray", "torch", "mlflow", "deepspeed")),
        ("workers", ("ray", "torch", "mlflow", "deepspeed")),
        ("engine", ("ray", "mlflow", "deepspeed", "pyarrow", "fsspec", "transformers")),
        ("torch_engine", ("ray", "mlflow", "deepspeed", "pyarrow", "fsspec", "transformers")),
        ("deepspeed_engine", ("ray", "mlflow", "deepspeed")),
        ("collectives", ("ray", "mlflow", "deepspeed")),
    ],
)
def test_heavy_libraries_wait_for_their_use(module: str, absent: tuple[str, ...]) -> None:
    program = f"import sys, cluster.{module}; print(*(name for name in {absent} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
