"""README says the truth about the files that there are."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
TREE = re.compile(r"^```\w*\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def tree_paths() -> dict[str, str]:
    """{path: comment} of README's annotated tree: two spaces of indent a level, folders end in a slash."""
    block = next(b for b in TREE.findall((ROOT / "README.md").read_text()) if "moca_core/" in b)
    paths, folders = {}, []
    for line in block.splitlines():
        name, _, comment = line.strip().partition("  ")
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        paths["".join(folders) + name] = comment.strip()
        if name.endswith("/"):
            folders.append(name)
    return paths


def repository_files() -> set[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return {path for path in listed if (ROOT / path).exists()}


def test_every_file_of_the_packages_is_in_the_tree_and_the_other_way_round():
    paths = tree_paths()
    files = {p for p in repository_files() if p.split("/")[0] in ("moca_core", "cluster", "pipelines")}
    files = {p for p in files if not p.endswith("__init__.py")}
    named = {p for p in paths if not p.endswith("/")}
    in_packages = {p for p in named if p.split("/")[0] in ("moca_core", "cluster", "pipelines")}
    assert in_packages == files
    assert all((ROOT / path).exists() for path in paths)


def test_every_entry_says_what_it_is_in_few_words():
    for path, comment in tree_paths().items():
        assert comment, f"{path} has no words"
        assert len(comment.split()) <= 16, f"{path}: {comment}"


def test_the_commands_that_readme_names_exist():
    text = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"`?make ([a-z-]+)", text))
    makefile = (ROOT / "Makefile").read_text()
    assert {"run", "test"} <= targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    assert all((ROOT / script).exists() for script in re.findall(r"python (\S+\.py)", text))
