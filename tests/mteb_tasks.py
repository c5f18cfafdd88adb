"""A task of ours as a task of mteb, with nothing to download: mteb then judges the same queries and candidates."""

import io
from typing import Any

from datasets import Dataset
from datasets import Image as ImageFeature
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from PIL import Image

from moca_core.types import Content, EvalTask


def as_mteb_task(task: EvalTask, main_score: str = "ndcg_at_5") -> AbsTaskRetrieval:
    """Every side must be texts, images, or an image and then a text; all contents of a side alike."""
    queries, corpus = [query.content for query in task.queries], list(task.candidates)
    sides = {"t" if _kinds(queries) == ("text",) else "".join(kind[0] for kind in _kinds(queries))}
    category = f"{sides.pop()}2{''.join(kind[0] for kind in _kinds(corpus))}"

    class Local(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="Local" + "".join(part.capitalize() for part in task.name.replace("/", "_").split("_")),
            description="a task of this project",
            reference=None,
            dataset={"path": "local/none", "revision": "1"},
            type="Any2AnyRetrieval",
            category=category,
            modalities=["text", "image"] if "i" in category else ["text"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score=main_score,
        )

        def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
            self.corpus = {"test": _dataset([f"d{n:06d}" for n in range(len(corpus))], corpus)}
            self.queries = {"test": _dataset([f"q{n:06d}" for n in range(len(queries))], queries)}
            self.relevant_docs = {
                "test": {
                    f"q{n:06d}": {
                        f"d{place:06d}": int(grade)
                        for place, grade in zip(q.positives, q.grades or [1] * len(q.positives), strict=True)
                    }
                    for n, q in enumerate(task.queries)
                }
            }
            if any(query.candidates is not None for query in task.queries):
                pools = (q.candidates or range(len(corpus)) for q in task.queries)
                ranked = {f"q{n:06d}": [f"d{place:06d}" for place in pool] for n, pool in enumerate(pools)}
                self.top_ranked = {"test": ranked}
            self.data_loaded = True

    return Local()


def _kinds(contents: list[Content]) -> tuple[str, ...]:
    (kinds,) = {tuple("text" if segment.image is None else "image" for segment in content) for content in contents}
    assert kinds in (("text",), ("image",), ("image", "text"))
    return kinds


def _dataset(names: list[str], contents: list[Content]) -> Dataset:
    kinds = _kinds(contents)
    columns = {"id": names, "modality": [",".join(sorted(kinds))] * len(names)}
    for place, kind in enumerate(kinds):
        columns[kind] = [
            content[place].text if kind == "text" else Image.open(io.BytesIO(content[place].image))
            for content in contents
        ]
    rows = Dataset.from_dict(columns)
    return rows.cast_column("image", ImageFeature()) if "image" in kinds else rows
