"""The documentation of installed packages, read by parsing their .py files: no package is ever imported.

An entry is a public function, class or method with a docstring of decent prose. The same entries come out, in the same order,
for the same installed versions.
"""

import ast
import importlib.util
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from moca_core.sources.builtin.prose import first_sentence, paragraphs
from moca_core.sources.builtin.split import is_held_out, stable_hash

# Packages that come with this project (its requirements and theirs), by import name, each with the name of its distribution.
PACKAGES = {
    "matplotlib": "matplotlib",
    "networkx": "networkx",
    "numpy": "numpy",
    "pandas": "pandas",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "torch": "torch",
    "transformers": "transformers",
}
ENTRIES_PER_PACKAGE = 480  # numpy, sklearn and matplotlib have fewer; the others far more
HELD_OUT_ONE_IN = 16  # leaves about 30 entries of each package for evaluation
SUMMARY_CHARS = (25, 160)
BODY_CHARS = 200  # at least
MIN_LETTERS = 0.76  # of all characters, letters and spaces: below this it is a table or a formula

# Tests, vendored code, compilers' internals, and the hundreds of near-copies in transformers/models.
_SKIPPED_FOLDERS = {
    "tests", "test", "testing", "_vendor", "_lib", "externals", "models", "_inductor", "_dynamo", "_export", "_refs",
    "_functorch", "onnx", "_internal", "array_api_extra", "array_api_compat",
}  # fmt: skip
_NOT_OWN_NAME = 4  # words that a summary must have left when the name of its function is taken out


@dataclass(frozen=True)
class Entry:
    """One documented thing. `body` has one paragraph per line and does not hold the summary."""

    package: str
    name: str  # numpy.mean
    module: str  # numpy._core.fromnumeric: where it is written; entries of one module are alike
    summary: str  # one sentence
    query: str  # the summary without the thing's own name
    body: str

    @property
    def held_out(self) -> bool:
        # By query, so that two packages that describe something in the same words are on the same side.
        return is_held_out(self.query.lower(), HELD_OUT_ONE_IN)

    @property
    def order(self) -> int:
        """A place in a shuffled order that does not depend on which other entries there are."""
        return stable_hash("entry", self.query.lower())


@lru_cache(maxsize=len(PACKAGES))
def entries(package: str) -> tuple[Entry, ...]:
    """At most ENTRIES_PER_PACKAGE entries of one package, shuffled; no two share a query or the beginning of a body.

    Files are read in a shuffled order until there are enough: parsing is most of the cost of the built-in corpus.
    """
    if package not in PACKAGES:
        raise ValueError(f"{package!r} is not a package of the built-in corpus: {', '.join(PACKAGES)}")
    kept: list[Entry] = []
    seen: set[str] = set()
    for entry in _scan(package):
        keys = {"query " + entry.query.lower(), "body " + entry.body[:BODY_CHARS]}
        if not keys & seen:
            seen |= keys
            kept.append(entry)
            if len(kept) == ENTRIES_PER_PACKAGE:
                break
    return tuple(sorted(kept, key=lambda entry: entry.order))


def training_entries(package: str) -> list[Entry]:
    return [entry for entry in entries(package) if not entry.held_out]


def held_out_entries() -> list[Entry]:
    """The held-out entries of all packages, shuffled together, without those that two packages describe in the same words."""
    held_out = {entry.query.lower(): entry for package in PACKAGES for entry in entries(package) if entry.held_out}
    return sorted(held_out.values(), key=lambda entry: entry.order)


def without_name(summary: str, name: str) -> str:
    """The summary without the last part of the name, which would give the answer away."""
    bare = re.sub(rf"\b(\w+\.)*{re.escape(name.rsplit('.', 1)[-1])}\b(\(\))?", "", summary, flags=re.IGNORECASE)
    return re.sub(r"\s+([.,;:])", r"\1", re.sub(r"\s+", " ", bare)).strip(" ,;:")


def _scan(package: str) -> Iterator[Entry]:
    spec = importlib.util.find_spec(package)  # of a top-level name: finds, does not import
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the built-in corpus reads the documentation of {PACKAGES[package]}, which is not installed")
    root = Path(spec.submodule_search_locations[0])
    paths = [(path.relative_to(root).parts, path) for path in root.rglob("*.py")]
    for inside, path in sorted(paths, key=lambda item: stable_hash(package, *item[0])):
        if _SKIPPED_FOLDERS.isdisjoint(inside) and not path.name.startswith("test_"):
            module = ".".join((package, *inside[:-1], path.stem)).removesuffix(".__init__")
            for name, docstring in _docstrings(path):
                entry = _entry(package, module, name, docstring)
                if entry is not None:
                    yield entry


def _docstrings(path: Path) -> Iterator[tuple[str, str]]:
    source = path.read_bytes()
    if source.count(b'"""') < 2:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # other people's escapes
        try:
            tree = ast.parse(source)
        except SyntaxError:
            return  # written for another version of Python than this one
    for node in tree.body:
        yield from _own_docstring(node, "")
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in node.body:
                yield from _own_docstring(method, node.name + ".")


def _own_docstring(node: ast.stmt, prefix: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
        docstring = ast.get_docstring(node, clean=False)
        if docstring and len(docstring) > BODY_CHARS:
            yield prefix + node.name, docstring


def _entry(package: str, module: str, name: str, docstring: str) -> Entry | None:
    lines = paragraphs(docstring)
    if not lines:
        return None
    summary, rest = first_sentence(lines[0])
    body = "\n".join([rest, *lines[1:]] if rest else lines[1:])
    query = without_name(summary, name)
    letters = sum(c.isalpha() and c.isascii() for c in body) + body.count(" ")
    decent = (
        SUMMARY_CHARS[0] <= len(summary) <= SUMMARY_CHARS[1]
        and len(query.split()) >= _NOT_OWN_NAME
        and summary[0].isupper()
        and len(body) >= BODY_CHARS
        and letters >= MIN_LETTERS * len(body)
        and "deprecated" not in summary.lower()
    )
    return Entry(package, f"{_public(module)}.{name}", module, summary, query, body) if decent else None


def _public(module: str) -> str:
    """Where users find it: private modules are re-exported by the package around them (sklearn.svm._classes -> sklearn.svm)."""
    parts = module.split(".")
    private = next((i for i, part in enumerate(parts) if part.startswith("_")), len(parts))
    return ".".join(parts[:private])
