"""What data tasks import: many of them start at once, and torch would cost each two seconds and 300 MB."""

import subprocess
import sys

MODULES = ("training.stream", "training.pair_streams", "steps.pretrain", "steps.finetune", "steps.corpus", "steps.pack")


def test_data_tasks_start_without_torch() -> None:
    program = "import sys\n" + "".join(f"import pipelines.{module}\n" for module in MODULES)
    program += "print(*(name for name in ('torch', 'transformers', 'deepspeed', 'mlflow') if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
