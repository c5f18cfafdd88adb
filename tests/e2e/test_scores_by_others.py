"""Scores of a demo's exported model on its held-out tasks and on KiCad's: ours, mteb's and sentence-transformers' are the same.

MOCA_DEMO=runs/demo/latest python -m pytest tests/e2e/test_scores_by_others.py -m slow -s
"""

import os
from pathlib import Path

import numpy as np
import pyarrow.fs as pafs
import pytest

from moca_core.benchmarks import Prompts
from moca_core.embedder import Embedder
from moca_core.mteb_encoder import MtebEncoder
from moca_core.readers import with_sentence_transformers
from moca_core.sources import Location, mmeb_eval
from moca_core.sources.builtin import pairs as builtin
from moca_core.types import EvalTask
from pipelines.evaluation.scoring import score_query
from tests.e2e.conftest import KICAD, ROOT

MODEL = Path(os.environ.get("MOCA_DEMO", ROOT / "runs" / "demo" / "latest")) / "export" / "model"
MAX_TOKENS = 1024  # what the demo exports: sentence-transformers reads no more
MTEB_DIGITS = 5  # it rounds its means

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not MODEL.exists(), reason="no demo has run: make run")]


def tasks() -> list[EvalTask]:
    found = list(builtin.read_tasks(None))
    if KICAD.exists():
        found += mmeb_eval.read_tasks(Location(pafs.LocalFileSystem(), str(KICAD / "mmeb_eval.parquet")))
    return found


TASKS = {task.name: task for task in (tasks() if MODEL.exists() else [])}


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder(str(MODEL), max_tokens=MAX_TOKENS, device="cpu")


def mean_scores(task: EvalTask, queries: np.ndarray, candidates: np.ndarray) -> tuple[float, float]:
    """(precision@1, nDCG@5) by our runner's arithmetic."""
    rows = [
        score_query(candidates @ vector, list(q.positives), q.grades, q.candidates)
        for q, vector in zip(task.queries, queries, strict=True)
    ]
    return tuple(float(np.mean([row[name] for row in rows])) for name in ("precision_at_1", "ndcg_at_5"))


def judged(model, task: EvalTask) -> tuple[float, float]:
    """The same by mteb; with one right answer to a query its nDCG@1 is precision@1."""
    import mteb

    from tests.mteb_tasks import as_mteb_task

    assert all(len(query.positives) == 1 for query in task.queries)
    given = {"batch_size": 16, "show_progress_bar": False}
    (found,) = mteb.evaluate(model, as_mteb_task(task), cache=None, encode_kwargs=given).task_results
    scores = found.scores["test"][0]
    return scores["ndcg_at_1"], scores["ndcg_at_5"]


@pytest.mark.parametrize("name", TASKS)
def test_all_say_the_same(name: str, embedder: Embedder) -> None:
    from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
    from sentence_transformers import SentenceTransformer

    task = TASKS[name]
    queries, candidates = [query.content for query in task.queries], list(task.candidates)
    model = SentenceTransformerEncoderWrapper(SentenceTransformer(str(MODEL), device="cpu"))
    model.mteb_model_meta.modalities = ["text", "image"]
    scores = {
        "ours": mean_scores(task, embedder.encode(queries), embedder.encode(candidates)),
        "mteb with our encoder": judged(MtebEncoder(embedder, "moca/demo", "1", Prompts()), task),
        "mteb with sentence-transformers": judged(model, task),
        "sentence-transformers": mean_scores(
            task, *(with_sentence_transformers(str(MODEL), side) for side in (queries, candidates))
        ),
    }
    print(f"\n{name}: {len(queries)} queries, {len(candidates)} candidates")
    for who, (precision, ndcg) in scores.items():
        print(f"  {who:<32}precision@1 {precision:.6f}  nDCG@5 {ndcg:.6f}")
    for who, said in scores.items():
        ours = np.round(scores["ours"], MTEB_DIGITS) if "mteb" in who else scores["ours"]
        assert said == pytest.approx(ours, abs=1e-9)
