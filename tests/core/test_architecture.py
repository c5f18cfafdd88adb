"""The rules of the house, read off the syntax trees: who imports whom, how long files are, what is never called."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("moca_core", "cluster", "pipelines")
FILES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
NAMES = [str(p.relative_to(ROOT)) for p in FILES]
MAX_LINES = 400


def parse(path):
    return ast.parse(path.read_text(), str(path))


def imported(tree, package=""):
    """Full names of everything imported anywhere in a module, `from a import b` as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant))


def imports_of(path):
    package = ".".join(path.relative_to(ROOT).parent.parts) if path.is_relative_to(ROOT) else ""
    return set(imported(parse(path), package))


def under(name, prefix):
    return name == prefix or name.startswith(prefix + ".")


def forbidden(name):
    """Prefixes that the module at this path never imports."""
    if name.startswith("moca_core/"):
        banned = ["ray", "deepspeed", "mlflow", "cluster", "pipelines"]
    elif name.startswith("cluster/"):
        banned = ["moca_core", "pipelines"]
    else:
        banned = ["deepspeed", "ray.train", "ray.tune", "ray.serve"]
        if name != "pipelines/served_model.py":
            banned.append("mlflow")
        if not name.startswith(("pipelines/steps/", "pipelines/training/")):
            banned.append("ray.data")
    if name.startswith("pipelines/steps/"):
        steps = [Path(n).stem for n in NAMES if n.startswith("pipelines/steps/") and not n.endswith("__init__.py")]
        banned += [f"pipelines.steps.{step}" for step in steps if step != Path(name).stem]
    return banned


def breaches(name, imports):
    return sorted(i for i in imports for prefix in forbidden(name) if under(i, prefix))


def test_imports_go_one_way():
    assert {n: b for n in NAMES if (b := breaches(n, imports_of(ROOT / n)))} == {}


def test_there_is_something_to_walk():
    assert {n.split("/")[0] for n in NAMES} == set(PACKAGES) and len(NAMES) > 40
    assert "pipelines/steps/base.py" in NAMES and "moca_core/attention.py" in NAMES


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("moca_core/x.py", "def f():\n    import ray.data"),
        ("moca_core/x.py", "from cluster import storage"),
        ("moca_core/data/x.py", "from ...pipelines import dag"),
        ("moca_core/x.py", "importlib.import_module('mlflow')"),
        ("cluster/x.py", "from moca_core.types import Document"),
        ("cluster/x.py", "import pipelines"),
        ("pipelines/full.py", "from ray import train"),
        ("pipelines/full.py", "from ray.data import Dataset"),
        ("pipelines/steps/pack.py", "import deepspeed.ops"),
        ("pipelines/steps/pack.py", "from mlflow import log_metric"),
        ("pipelines/steps/pack.py", "from .base import run"),
        ("pipelines/steps/pack.py", "from pipelines.steps import corpus"),
    ],
)
def test_the_walk_sees_what_it_should(name, code):
    package = ".".join(Path(name).parent.parts)
    assert breaches(name, set(imported(ast.parse(code), package)))


def test_files_are_short_and_named_after_an_idea():
    lengths = {n: (ROOT / n).read_text().count("\n") for n in NAMES}
    assert {n: count for n, count in lengths.items() if count > MAX_LINES} == {}
    vague = re.compile(r"(utils?|helpers?|common|misc|base.*)")
    assert [n for n in NAMES if vague.fullmatch(Path(n).stem)] == ["pipelines/steps/base.py"]


PICKLES = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve")
# What unpickles when told to. DeepSpeed's shards are pickles, read back by the system that wrote them.
LOADERS = {"torch.load": ("weights_only", "False"), "np.load": ("allow_pickle", "True")}
OWN_CHECKPOINTS = "cluster/checkpoint.py"


def runs_foreign_code(name, tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called, said = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            argument, value = LOADERS.get(called, (None, None))
            unpickles = argument and said.get(argument) == value and name != OWN_CHECKPOINTS
            if called in ("eval", "exec", "__import__") or unpickles or said.get("trust_remote_code") == "True":
                yield ast.unparse(node)
    yield from (i for i in imported(tree) for b in PICKLES if under(i, b))


def test_nothing_is_evaluated_or_unpickled():
    assert {n: found for n in NAMES if (found := list(runs_foreign_code(n, parse(ROOT / n))))} == {}
    for code in ("eval(x)", "import pickle", "from pickle import loads", "torch.load(p, weights_only=False)"):
        assert list(runs_foreign_code("moca_core/x.py", ast.parse(code)))


def test_no_token_id_is_written_down():
    """Qwen's special tokens are 151643 to 151668; ids belong to the checkpoint and are read from it."""
    core = [n for n in NAMES if n.startswith("moca_core/")]
    assert [n for n in core if re.search(r"\b151_?[67]\d\d\b", (ROOT / n).read_text())] == []


def test_importing_starts_nothing():
    """At module level stand imports, definitions and assignments: no loops, no calls for their effect."""
    effects = {
        n: ast.unparse(node)
        for n in NAMES
        for node in parse(ROOT / n).body
        if isinstance(node, ast.For | ast.While | ast.With)
        or (isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant))
    }
    assert effects == {"pipelines/served_model.py": "mlflow.models.set_model(EmbeddingModel())"}


def test_small_processes_of_the_data_side_need_no_torch():
    """What Ray Data runs lies in these modules; its processes are many, and each pays for what it imports."""
    steps = [f"pipelines.steps.{step}" for step in ("corpus", "pairs", "clean", "pack", "pretrain", "finetune")]
    code = f"import sys, {', '.join(steps)}; print(*{{'torch', 'transformers', 'deepspeed'}} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.split() == []


def test_every_module_says_what_it_is():
    silent = [n for n in NAMES if not n.endswith("__init__.py") and not ast.get_docstring(parse(ROOT / n))]
    assert silent == []
