"""The documentation of installed packages, read by parsing their .py files: no package is ever imported.

An entry is a public function, class or method with a docstring of decent prose. The same entries
come out, in the same order, for the same installed versions.
"""

import ast
import gc
import importlib.util
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from moca_core.sources.builtin.prose import first_sentence, paragraphs
from moca_core.sources.builtin.split import is_held_out, stable_hash

# Packages that come with this project (its requirements and theirs): import name -> name of the distribution.
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
ENTRIES_PER_PACKAGE = 440  # numpy, sklearn and matplotlib have fewer; the others far more
HELD_OUT_ONE_IN = 16  # leaves about 27 entries of each package for evaluation
SUMMARY_CHARS = (25, 160)
BODY_CHARS = 200  # at least
MIN_LETTERS = 0.76  # of all characters, letters and spaces: below this it is a table or a formula

# Tests, vendored code, compilers' internals, and the hundreds of near-copies in transformers/models.
_SKIPPED_FOLDERS = {
    "tests", "test", "testing", "_vendor", "_lib", "externals", "models", "_inductor", "_dynamo", "_export", "_refs",
    "_functorch", "onnx", "_internal", "array_api_extra", "array_api_compat",
}  # fmt: skip
_NOT_LETTER = re.compile(r"[^A-Za-z ]+")
_BYTES_PER_QUOTE = 3000  # files with fewer docstrings than that are not worth their parsing
_DOCSTRING_CHARS = 5000  # what is read of one; far more than is ever used
_OPENING_CHARS = 120  # of a body: two that begin alike are the same to us
_QUERY_WORDS = 4  # words that a summary must have left when the name of its function is taken out


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
        if seen.isdisjoint(_openings(entry)):
            seen |= _openings(entry)
            kept.append(entry)
            if len(kept) == ENTRIES_PER_PACKAGE:
                break
    return tuple(sorted(kept, key=lambda entry: entry.order))


def training_entries(package: str) -> list[Entry]:
    return [entry for entry in entries(package) if not entry.held_out]


def held_out_entries() -> list[Entry]:
    """The held-out entries of all packages, shuffled together.

    Documentation is copied about, between packages too: what begins like another held-out entry, or is found in the
    text of a training entry, is left out.
    """
    everything = [entry for package in PACKAGES for entry in entries(package)]
    trained_on = "\n".join(entry.body for entry in everything if not entry.held_out)
    taken: set[str] = set()
    kept: list[Entry] = []
    for entry in sorted(everything, key=lambda entry: entry.order):
        if entry.held_out and taken.isdisjoint(_openings(entry)) and entry.body[:_OPENING_CHARS] not in trained_on:
            taken |= _openings(entry)
            kept.append(entry)
    return kept


def without_name(summary: str, name: str) -> str:
    """The summary without the last part of the name, which would give the answer away."""
    own = name.rsplit(".", 1)[-1]
    if own.lower() not in summary.lower():
        return summary.strip(" ,;:")
    bare = re.sub(rf"\b(\w+\.)*{re.escape(own)}\b(\(\))?", "", summary, flags=re.IGNORECASE)
    return re.sub(r"\s+([.,;:])", r"\1", re.sub(r"\s+", " ", bare)).strip(" ,;:")


def _openings(entry: Entry) -> set[str]:
    """Two entries are the same for our purposes if they share one of these."""
    return {f"query {entry.query.lower()}", f"body {entry.body[:_OPENING_CHARS]}"}


def _scan(package: str) -> Iterator[Entry]:
    spec = importlib.util.find_spec(package)  # of a top-level name: finds, does not import
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the built-in corpus reads the documentation of {PACKAGES[package]}, which is not installed")
    root = Path(spec.submodule_search_locations[0])
    paths = [(path.relative_to(root).parts, path) for path in root.rglob("*.py")]
    for inside, path in sorted(paths, key=lambda item: stable_hash(package, *item[0])):
        if _SKIPPED_FOLDERS.isdisjoint(inside) and not path.name.startswith(("test_", "conftest")):
            module = ".".join((package, *inside[:-1], path.stem)).removesuffix(".__init__")
            for name, docstring in _docstrings(path):
                entry = _entry(package, module, name, docstring)
                if entry is not None:
                    yield entry


def _docstrings(path: Path) -> Iterator[tuple[str, str]]:
    source = path.read_bytes()
    if source.count(b'"""') * _BYTES_PER_QUOTE < len(source):
        return
    for node in _parse(source).body:
        yield from _own_docstring(node, "")
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in node.body:
                yield from _own_docstring(method, node.name + ".")


def _parse(source: bytes) -> ast.Module:
    """The file's tree; an empty one if it is written for another version of Python than this one."""
    collecting = gc.isenabled()
    gc.disable()  # trees are many objects and no cycles: with collections going on, parsing takes a third longer
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # other people's escapes
            return ast.parse(source)
    except SyntaxError:
        return ast.Module(body=[], type_ignores=[])
    finally:
        if collecting:
            gc.enable()


def _own_docstring(node: ast.stmt, prefix: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
        docstring = ast.get_docstring(node, clean=False)
        if docstring and len(docstring) > BODY_CHARS:
            yield prefix + node.name, docstring[:_DOCSTRING_CHARS]


def _entry(package: str, module: str, name: str, docstring: str) -> Entry | None:
    lines = paragraphs(docstring)
    if not lines:
        return None
    summary, rest = first_sentence(lines[0])
    body = "\n".join([rest, *lines[1:]] if rest else lines[1:])
    query = without_name(summary, name)
    letters = len(_NOT_LETTER.sub("", body))
    decent = (
        SUMMARY_CHARS[0] <= len(summary) <= SUMMARY_CHARS[1]
        and len(query.split()) >= _QUERY_WORDS
        and summary[0].isupper()
        and len(body) >= BODY_CHARS
        and letters >= MIN_LETTERS * len(body)
        and "deprecated" not in summary.lower()
    )
    return Entry(package, f"{_public(module)}.{name}", module, summary, query, body) if decent else None


def _public(module: str) -> str:
    """Where users find it: what private modules hold is exported by the package around them (sklearn.svm._classes)."""
    parts = module.split(".")
    private = next((i for i, part in enumerate(parts) if part.startswith("_")), len(parts))
    return ".".join(parts[:private])
