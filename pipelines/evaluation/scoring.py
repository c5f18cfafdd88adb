"""Ranking candidates for the queries of a task, block by block, and what every query scores.

rankings/MODEL/TASK.parquet     a row for every query, in order
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from cluster import storage
from moca_core.metrics import best, ranking
from pipelines.evaluation.embedding import Reader, Vectors
from pipelines.evaluation.tasks import SIDES, StoredTask
from pipelines.tables import read_table, table_writer
from pipelines.vectors import read_ids

SCORES_BYTES = 2**28  # of similarities in memory
TOP = 10
VERSION = 1  # raised by hand when the same vectors would get other scores

METRICS = ("precision_at_1", "ndcg_at_5", "ndcg_at_10", "recall_at_1", "recall_at_5", "recall_at_10")
RANKINGS = pa.schema(  # `right_rank` is where the best right answer stands, from 1; `top` are positions among the task's candidates
    [
        *((name, pa.float64()) for name in (*METRICS, "chance", "right_rank")),
        ("right_similarity", pa.float32()),
        ("top", pa.list_(pa.int64())),
        ("similarity", pa.list_(pa.float32())),
    ]
)


def ranking_file(label: str, task: str) -> str:
    return f"rankings/{label}/{task}.parquet"


@dataclass(frozen=True)
class ScoringUnit:
    reader: Reader
    task: StoredTask


def score(number: int, *, units: list[ScoringUnit], uri: str, vectors_uri: str) -> dict:
    """Writes the rankings of a unit. In memory are the vectors of its queries, one file of candidates, and a block of similarities."""
    unit = units[number]
    judged = read_table(unit.task.table("queries"), columns=["positives", "grades", "candidates"])
    queries, candidates = (
        Vectors.find(
            read_ids(unit.task.table(side)),
            storage.join(uri, index_file(unit.reader.space(side, unit.task.prompts))),
            vectors_uri,
        )
        for side in SIDES
    )
    asked = queries.whole()
    block_rows = max(1, SCORES_BYTES // (4 * len(candidates)))
    with table_writer(storage.join(uri, ranking_file(unit.reader.label, unit.task.name)), RANKINGS, None) as writer:
        for start in range(0, len(asked), block_rows):
            block = asked[start : start + block_rows]
            similarity = np.empty((len(block), len(candidates)), dtype=np.float32)
            for places, vectors in candidates.blocks():
                similarity[:, places] = block @ vectors.T
            rows = zip(similarity, judged.slice(start, len(block)).to_pylist(), strict=True)
            writer.write(pa.Table.from_pylist([score_query(scores, **row) for scores, row in rows], schema=RANKINGS))
    return {}


def score_query(
    scores: np.ndarray, positives: list[int], grades: list[float] | None, candidates: list[int] | None
) -> dict:
    """A row of RANKINGS. scores: of all candidates of the task; candidates: those that the query chooses from, None: all."""
    pool, right = np.arange(len(scores)), positives
    if candidates is not None:
        pool, places = np.array(candidates), {position: place for place, position in enumerate(candidates)}
        right = [places[position] for position in positives]
    scores = scores[pool]
    found, top = ranking(scores, right), best(scores, TOP)
    return {
        "precision_at_1": found.precision_at_1(),
        **{f"ndcg_at_{k}": found.ndcg(k, grades) for k in (5, 10)},
        **{f"recall_at_{k}": found.recall(k) for k in (1, 5, 10)},
        "chance": len(right) / len(pool),
        "right_rank": found.right_rank(),
        "right_similarity": scores[right].max(),
        "top": pool[top],
        "similarity": scores[top],
    }


def index_file(space: str) -> str:
    return f"index/{space}.parquet"
