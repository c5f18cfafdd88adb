"""Importing the package starts nothing and loads nothing heavy."""

import subprocess
import sys

import pytest

# Imports one module after the other, and says after which something was there that must not be.
PROGRAM = """
import sys, importlib
for module in {modules}:
    importlib.import_module("cluster." + module)
    print(*(f"{{module}}:{{name}}" for name in {absent} if name in sys.modules))
"""


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (("storage",), ("ray", "torch", "mlflow", "s3fs", "deepspeed")),
        (("workers", "tracking"), ("ray", "torch", "mlflow", "deepspeed")),
        (("torch_engine", "engine"), ("ray", "mlflow", "deepspeed", "pyarrow", "fsspec", "transformers")),
        (("deepspeed_engine", "collectives"), ("ray", "mlflow", "deepspeed")),
    ],
)
def test_heavy_libraries_wait_for_their_use(modules: tuple[str, ...], absent: tuple[str, ...]) -> None:
    program = PROGRAM.format(modules=modules, absent=absent)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
