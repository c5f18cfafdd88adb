"""clean: what must not be learned from is taken out of the Corpus: copies, and what an evaluation set holds.

Only keys are read, never documents: the result is a table of what to leave out, which whoever reads the Corpus applies.
"""

from collections import Counter
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster import storage
from cluster.batch import run_units
from moca_core.data.duplicates import CleanRules, find_dropped
from moca_core.data.schema import DROPPED, KEYS
from pipelines.cleaned import CleanedCorpus
from pipelines.pictures.counts import count_bars
from pipelines.runner.step import Context, Step
from pipelines.tables import open_table, read_table, table_writer

KEYS_PER_RANGE = 2**21  # held in memory by one task
ROWS_PER_GROUP = 2**14


def clean_step(config: CleanRules) -> Step:
    return Step("clean", run, config, needs=("corpus", "pairs"), code_version=2, resumable=True)


def run(context: Context) -> dict:
    """Result: {"dropped": [path of a table], "counts": {reason: count}}."""
    rules: CleanRules = context.config
    corpus, pairs = context.inputs["corpus"], context.inputs["pairs"]
    used = dict.fromkeys(range(corpus.result["parts"]), 0)
    for group in CleanedCorpus(corpus.uri, "", ()).groups():
        used[group.part] += group.documents
    ranges = max(1, -(-corpus.result["keys"] // KEYS_PER_RANGE))
    task = partial(
        clean_range,
        ranges=ranges,
        parts=[(part, corpus.path(f"keys/part-{part:05d}.parquet"), rows) for part, rows in used.items() if rows],
        evaluation=[pairs.path(file) for file in pairs.result["evaluation_keys"]],
        rules=rules,
        uri=context.uri,
    )
    results = run_units(task, ranges, state_uri=context.path("state"), say=context.say)
    counts = sum((Counter(result["counts"]) for result in results), Counter())
    for reason, count in counts.most_common():
        context.say(f"{count}: {reason}")
    context.say(f"{sum(counts.values())} taken out of {corpus.result['documents']} documents")
    read = {"documents": corpus.result["documents"]}
    context.keep("taken_out.png", count_bars("documents read, and what was taken out of them", read, counts))
    context.run.log_metrics({f"dropped/{reason}": count for reason, count in counts.items()})
    return {"dropped": [result["file"] for result in results], "counts": dict(sorted(counts.items()))}


def clean_range(
    number: int,
    *,
    ranges: int,
    parts: list[tuple[int, str, int]],
    evaluation: list[str],
    rules: CleanRules,
    uri: str,
) -> dict:
    """What goes because of keys in one range of all there can be: every occurrence of such a key is read here."""
    keys = pa.concat_tables([_keys_of(part, file, used, number, ranges) for part, file, used in parts])
    held_out = pa.concat_tables([read_table(file, filters=pc.field("kind") == "content") for file in evaluation])
    dropped = find_dropped(keys, held_out["key"].combine_chunks(), rules)
    name = f"dropped/range-{number:05d}.parquet"
    with table_writer(storage.join(uri, name), DROPPED, ROWS_PER_GROUP) as writer:
        writer.write(dropped)
    return {"file": name, "counts": dict(Counter(dropped["reason"].to_pylist()))}


def _keys_of(part: int, file: str, used: int, number: int, ranges: int) -> pa.Table:
    """KEYS of the used rows of a part whose key falls into the range, and the part's number."""
    found = []
    for batch in open_table(file).iter_batches(ROWS_PER_GROUP):
        first = np.frombuffer(b"".join(batch["key"].to_pylist()), dtype=">u8")[::2]
        mine = (first % np.uint64(ranges) == number) & (batch["row"].to_numpy() < used)
        found.append(batch.filter(pa.array(mine)))
    table = pa.Table.from_batches(found, schema=KEYS)
    return table.append_column("part", pa.array(np.full(table.num_rows, part, np.int32)))
