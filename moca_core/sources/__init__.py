"""One small adapter per public layout of documents, pairs or evaluation tasks.

A document adapter is a module with two functions:

    list_units(fs, path) -> list[dict]                        what can be read apart from each other (a file): cheap
    read_unit(fs, unit) -> Iterator[Document | Rejected]

A pair adapter has `list_units` and `read_pairs(fs, unit) -> Iterator[Pair | Rejected]`; a task adapter has
`read_tasks(fs, path) -> Iterator[EvalTask]`.

`fs` is a pyarrow FileSystem and `path` a path on it; a unit is a dict of literals, so that it can travel to another process.
Adapters turn a layout into documents, pairs or tasks and nothing more: what may enter is decided in `data/validate.py`.
"""

from importlib import import_module
from types import ModuleType

DOCUMENTS = {
    "builtin": "moca_core.sources.builtin.documents",
    "obelics": "moca_core.sources.obelics",
    "moca": "moca_core.sources.moca",
}
PAIRS = {
    "builtin": "moca_core.sources.builtin.pairs",
    "mmeb": "moca_core.sources.mmeb",
}
TASKS = {
    "builtin": "moca_core.sources.builtin.pairs",
    "mmeb": "moca_core.sources.mmeb_eval",
}


def adapter(registry: dict[str, str], layout: str) -> ModuleType:
    """The module for a layout. Raises ValueError naming the layouts there are."""
    if layout not in registry:
        raise ValueError(f"unknown layout {layout!r}; use one of {', '.join(sorted(registry))}")
    return import_module(registry[layout])
