"""One small adapter per public layout of documents, pairs or evaluation tasks.

A document adapter is a module with two functions:

    list_units(location) -> list[dict]                        what can be read apart from each other: cheap
    read_unit(location, unit) -> Iterator[Document | Rejected]

A pair adapter has `list_units` and `read_pairs(location, unit) -> Iterator[Pair | Rejected]`; a task adapter has
`read_tasks(location) -> Iterator[EvalTask]`. A module may be all three.

A unit is a dict of literals, so that it can travel to another process: a run of row groups, a range of lines, a file. Where an
adapter knows how many rows a unit holds it says so under "rows"; a mixture then reads no more units than it needs.
Adapters turn a layout into documents, pairs or tasks and nothing more: what may enter is decided in `data/validate.py`.
`OPTIONS` of a module names what a recipe may say beside the path; `docs/add_a_source.md` shows how to write one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType

import pyarrow.fs as pafs

DOCUMENTS = {
    "builtin": "moca_core.sources.builtin.documents",
    "obelics": "moca_core.sources.obelics",
    "moca": "moca_core.sources.moca",
    "mmc4": "moca_core.sources.mmc4",
    "webdataset": "moca_core.sources.webdataset",
    "text": "moca_core.sources.plain_text",
    "captions": "moca_core.sources.captions",
    "pages": "moca_core.sources.pages",
    "markup": "moca_core.sources.markup",
    "pdf": "moca_core.sources.pdf",
}
PAIRS = {
    "builtin": "moca_core.sources.builtin.pairs",
    "mmeb": "moca_core.sources.mmeb",
    "triplets": "moca_core.sources.triplets",
    "pages": "moca_core.sources.pages",
    "beir": "moca_core.sources.beir",
    "jsonl": "moca_core.sources.pairs_jsonl",
}
TASKS = {
    "builtin": "moca_core.sources.builtin.pairs",
    "mmeb": "moca_core.sources.mmeb_eval",
    "mmeb_v2": "moca_core.sources.mmeb_v2",
    "beir": "moca_core.sources.beir",
    "jsonl": "moca_core.sources.tasks_jsonl",
}


@dataclass(frozen=True)
class Location:
    """Where a source lies, and how it names things.

    `path` on `fs` is a file, a folder or a glob. `columns` says which column of the data plays a role of the layout
    ({"text": "vlm_caption"}); `images` is the folder that image paths are relative to (default: beside the file that names them).
    """

    fs: pafs.FileSystem
    path: str
    columns: Mapping[str, str] = field(default_factory=dict)
    images: str | None = None


def adapter(registry: dict[str, str], layout: str) -> ModuleType:
    """The module for a layout. Raises ValueError naming the layouts there are."""
    if layout not in registry:
        raise ValueError(f"unknown layout {layout!r}; use one of {', '.join(sorted(registry))}")
    return import_module(registry[layout])


def options(registry: dict[str, str], layout: str) -> dict[str, tuple[str, ...]]:
    """What a recipe may say of this layout beside its path: {"columns": its roles, "images": ()} or a part of that."""
    return getattr(adapter(registry, layout), "OPTIONS", {})
