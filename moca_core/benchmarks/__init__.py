"""Public benchmarks as data: their tasks, what they are measured by, how they are averaged, and the prompts they are asked with.

Nothing here reads a task: adapters of moca_core/sources do, and a task is found here again by its name.
"""

from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Literal

from moca_core.types import Content, Segment

Metric = Literal["precision_at_1", "ndcg_at_5", "ndcg_at_10"]


@dataclass(frozen=True)
class Prompts:
    """`query` stands before the text of every query; `image` is the text behind a candidate that is an image alone.

    They belong to a model: what it was trained with it must be asked with. The wrong ones cost MoCa ten points of nDCG on ViDoRe v2
    (embeddings-benchmark/mteb, pull request 5076).
    """

    query: str = ""
    image: str = ""

    def put(self, content: Content, *, query: bool) -> Content:
        """A query with its prompt, or a candidate with its own."""
        if not query:
            alone = self.image and all(segment.text is None for segment in content)
            return (*content, Segment(text=self.image)) if alone else content
        first = next((place for place, segment in enumerate(content) if segment.text is not None), None)
        if not self.query or first is None:
            return content
        return (*content[:first], Segment(text=self.query + content[first].text), *content[first + 1 :])


PROMPTS = {
    "none": Prompts(),
    # The MoCa authors' code for ViDoRe. Models of theirs; the line break is theirs too.
    "moca": Prompts(image="\nRepresent the given document image."),
    # The same words as the layout `mmeb` hands them to a training here, without the line break.
    "moca-trained": Prompts(image="Represent the given document image."),
    # VLM2Vec-V2's code for the visual documents of MMEB-V2.
    "vlm2vec": Prompts(
        query="Find a document image that matches the given query: ",
        image="Understand the content of the provided document image.",
    ),
}


@dataclass(frozen=True)
class BenchmarkTask:
    """`aliases` are other names of its folder. Tasks that are in nothing's training set, or in whose no one says, have None for
    `in_distribution`."""

    name: str
    benchmark: str
    meta_task: str
    metric: Metric
    in_distribution: bool | None = None
    prompts: str = "none"
    aliases: tuple[str, ...] = ()


_TABLES = ("mmeb", "visual_documents")


@lru_cache(maxsize=1)
def tasks() -> dict[str, BenchmarkTask]:
    """{name: task} of all benchmarks, in the order in which their papers list them."""
    return {task.name: task for table in _TABLES for task in import_module(f"moca_core.benchmarks.{table}").TASKS}


@lru_cache(maxsize=1)
def _known() -> dict[str, str]:
    return {_plain(alias): task.name for task in tasks().values() for alias in (task.name, *task.aliases)}


def known_name(path: str) -> str | None:
    """The task that the last part of a path names which names any: "MMEB-eval/ImageNet-1K/test.parquet" is ImageNet-1K."""
    parts = [part.partition(".parquet")[0] for part in reversed(path.split("/"))]
    return next((name for part in parts if (name := _known().get(_plain(part)))), None)


def _plain(name: str) -> str:
    """Copies of a set differ in such things."""
    return name.lower().replace("-", "").replace("_", "")
