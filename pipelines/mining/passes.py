"""The four passes of mining, unit by unit: contents get numbers, are embedded, searched for, and written into the pairs.

What a pass leaves below the step's folder for the next lies in a file per unit: `keys`, `vectors/queries`, `vectors/answers`, `found`.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import lru_cache

import numpy as np
import pyarrow as pa

from cluster import storage
from moca_core.data.answers import REASONS, Answers, number, pair_keys
from moca_core.data.schema import PAIRS, pairs_to_table
from moca_core.types import content_id
from pipelines.mining.config import MineConfig
from pipelines.mining.report import Mined, example
from pipelines.mining.units import PairUnit, PairUnits
from pipelines.tables import read_table, table_writer
from pipelines.vectors import read_vectors, write_vectors

EXAMPLES = 3  # pairs of every task that are written down for a person

FOUND = pa.schema(  # a row for every pair: where its mined negatives stand, how near they are, and how near its right answer is
    [
        ("pairs", pa.list_(pa.int64())),
        ("places", pa.list_(pa.int64())),
        ("scores", pa.list_(pa.float32())),
        ("positive", pa.float32()),
    ]
)


def unit_file(uri: str, folder: str, unit: PairUnit) -> str:
    return storage.join(uri, folder, f"{unit.number:05d}.parquet")


def train_file(unit: PairUnit) -> str:
    return f"train/{unit.task}/part-{unit.number:05d}.parquet"


def write_keys(place: int, *, units: PairUnits, uri: str) -> dict:
    unit = units.units[place]
    table = pair_keys(units.read(unit))
    with table_writer(unit_file(uri, "keys", unit), table.schema, None) as writer:
        writer.write(table)
    return {}


@lru_cache(maxsize=1)
def read_answers(units: PairUnits, task: str, uri: str) -> Answers:
    """What answers what in a task. A task's units follow each other, so a process reads it about once."""
    return Answers(pa.concat_tables([read_table(unit_file(uri, "keys", unit)) for unit in units.of_task(task)]))


class Embed:
    """In a process of the pool: vectors of the queries of a unit, and of the answers that no unit before it names."""

    def __init__(self, model: str, max_tokens: int | None, *, units: PairUnits, uri: str) -> None:
        from moca_core.embedder import Embedder

        self.embedder = Embedder(storage.localize(model), max_tokens=max_tokens)
        self.units, self.uri = units, uri

    def __call__(self, place: int) -> dict:
        unit = self.units.units[place]
        pairs = self.units.read(unit)
        asked = [number(content_id(pair.query)) for pair in pairs]
        queries = dict(zip(asked, (pair.query for pair in pairs), strict=True))  # equal ones once
        answers = read_answers(self.units, unit.task, self.uri)
        own = answers.first_named_by(unit.pairs)
        named = [
            pairs[pair - unit.start].answers[at]
            for pair, at in zip(answers.pair[own].tolist(), answers.place[own].tolist(), strict=True)
        ]
        vectors = self.embedder.encode([*queries.values(), *named])
        if not np.isfinite(vectors).all():
            raise ValueError("mine: the model's vectors hold NaN or infinity, and nothing can be ranked by them")
        row_of = {key: row for row, key in enumerate(queries)}
        write_vectors(unit_file(self.uri, "vectors/queries", unit), vectors[[row_of[key] for key in asked]])
        write_vectors(unit_file(self.uri, "vectors/answers", unit), vectors[len(queries) :])
        return {"embedded": len(vectors)}


class Search:
    """In a process of the pool: negatives for a block of units of one task, out of all answers of the task.

    The vectors of the block's queries are in memory, and those of the answers file by file (moca_core/mining.py says how much that is).
    """

    def __init__(self, config: MineConfig, blocks: list[list[PairUnit]], *, units: PairUnits, uri: str) -> None:
        self.config, self.blocks, self.units, self.uri = config, blocks, units, uri

    def __call__(self, place: int) -> dict:
        from moca_core.mining import best_of, choose, nearest

        config, block = self.config, self.blocks[place]
        task, pairs = block[0].task, range(block[0].pairs.start, block[-1].pairs.stop)
        answers = read_answers(self.units, task, self.uri)
        barred = answers.barred(pairs)
        queries = np.concatenate(list(self.vectors("queries", block)))
        corpus = self.vectors("answers", self.units.of_task(task))
        found = nearest(queries, corpus, config.top_k, (barred.rows, barred.entries))
        own = barred.reasons == REASONS.index("own_positive")
        positive = best_of(barred.rows[own], found.barred_scores[own], len(pairs))
        choice = choose(
            found,
            positive,
            negatives=config.negatives,
            skip_top=config.skip_top,
            max_positive_share=config.max_positive_share,
            sample=(config.seed, task, pairs.start) if config.sample else None,
        )
        rows = [
            {
                "pairs": answers.pair[entries[kept]],
                "places": answers.place[entries[kept]],
                "scores": scores[kept],
                "positive": best,
            }
            for entries, scores, kept, best in zip(found.entries, found.scores, choice.kept, positive, strict=True)
        ]
        table = pa.Table.from_pylist(rows, schema=FOUND)
        for unit in block:
            with table_writer(unit_file(self.uri, "found", unit), FOUND, None) as writer:
                writer.write(table.slice(unit.start - pairs.start, unit.rows))
        return {"task": task, "mined": asdict(Mined.of(found, choice, positive, barred))}

    def vectors(self, side: str, units: list[PairUnit]) -> Iterator[np.ndarray]:
        for unit in units:
            yield from read_vectors(unit_file(self.uri, f"vectors/{side}", unit))


def write_mined(place: int, *, config: MineConfig, units: PairUnits, uri: str) -> dict:
    """The pairs of a unit with their mined negatives; the first of a task as examples too."""
    unit = units.units[place]
    found = read_table(unit_file(uri, "found", unit)).to_pylist()
    addresses = [list(zip(row["pairs"], row["places"], strict=True)) for row in found]
    contents = units.answers(unit.task, {address for row in addresses for address in row})
    pairs, examples = [], []
    for pair, row, negatives in zip(units.read(unit), found, addresses, strict=True):
        mined = [contents[address] for address in negatives]
        given = [content for content in pair.negatives if content not in mined] if config.keep_given else []
        pairs.append(replace(pair, negatives=tuple([*mined, *given][: config.negatives])))
        if unit.start == 0 and len(examples) < EXAMPLES:
            examples.append(example(pair, row["positive"], list(zip(row["scores"], mined, strict=True))))
    with table_writer(storage.join(uri, train_file(unit)), PAIRS, units.rows_per_group) as writer:
        for pair in pairs:
            writer.write(pairs_to_table([pair]))
    return {"examples": "\n".join([f"## {unit.task}\n", *examples]) if examples else ""}
