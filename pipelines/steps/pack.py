"""pack: Corpus to PackedCorpus. Ray Data stages render documents to tokens, then pack them into rows of one token budget."""

from dataclasses import dataclass
from functools import partial

import pyarrow as pa

from cluster import storage
from moca_core.data.render import Renderer, load_tokenizer
from moca_core.data.rows import pack_sequences, render_documents
from moca_core.data.schema import PACKED
from moca_core.spec import BackboneSpec
from pipelines.runner.step import Context, Step
from pipelines.tables import open_table, table_writer

ROWS_PER_GROUP = 1  # a packed row is fetched alone: it is a micro-batch
MIN_FILL = 0.97


@dataclass(frozen=True)
class PackConfig:
    """`max_tokens` is the budget of a row, and the longest piece of a document. `window` pieces are packed together."""

    max_tokens: int = 2048
    window: int = 4096

    def __post_init__(self) -> None:
        if self.max_tokens < 8 or self.window < 1:
            raise ValueError(
                f"pack.max_tokens={self.max_tokens} must be at least 8 and pack.window={self.window} at least 1"
            )


def pack_step(config: PackConfig) -> Step:
    return Step("pack", run, config, needs=("corpus", "base"))


def run(context: Context) -> dict:
    """Result: {"files": [[path, rows]], "rows", "pieces", "tokens", "image_tokens", "fill", "cost_flops"}."""
    import ray.data

    config: PackConfig = context.config
    corpus, base = context.inputs["corpus"], context.inputs["base"]
    spec = BackboneSpec.from_dict(base.result["spec"])
    Renderer(None, spec, config.max_tokens)  # refuses a budget that cannot hold an image, before any work
    groups = [
        {"file": corpus.path(file), "group": group}
        for file, rows in corpus.result["files"]
        for group in range(-(-rows // corpus.result["rows_per_group"]))
    ]
    tokenizer = base.path(base.result["tokenizer"])
    dataset = ray.data.from_items(groups, override_num_blocks=len(groups))
    dataset = dataset.map_batches(
        partial(render_groups, tokenizer=tokenizer, spec=spec, max_tokens=config.max_tokens),
        batch_size=1,
        batch_format="pyarrow",
    )
    dataset = dataset.map_batches(
        partial(write_window, spec=spec, max_tokens=config.max_tokens, uri=context.uri),
        batch_size=config.window,
        batch_format="pyarrow",
    )
    context.say(f"rendering {corpus.result['documents']} documents")
    totals = dict.fromkeys(("rows", "pieces", "tokens", "image_tokens"), 0)
    cost_flops, files = 0.0, []
    for row in dataset.iter_rows():
        files.append([row["file"], row["rows"]])
        totals = {name: value + row[name] for name, value in totals.items()}
        cost_flops += row["cost_flops"]
        context.say(f"{totals['rows']} rows, {totals['tokens']} tokens")
    fill = totals["tokens"] / (totals["rows"] * config.max_tokens)
    if fill < MIN_FILL:
        context.say(
            f"rows are {fill:.1%} full, below {MIN_FILL:.0%}: the corpus is small for max_tokens={config.max_tokens}"
        )
    context.run.log_metrics({**totals, "fill": fill, "cost_flops": cost_flops})
    context.run.log_dataset("corpus", corpus.uri, corpus.uri.rsplit("/", 1)[-1], "pack")
    return {"files": files, "rows_per_group": ROWS_PER_GROUP, **totals, "fill": fill, "cost_flops": cost_flops}


def render_groups(batch: pa.Table, *, tokenizer: str, spec: BackboneSpec, max_tokens: int) -> pa.Table:
    """Row groups of the Corpus to the sequences of their documents."""
    renderer = Renderer(load_tokenizer(storage.localize(tokenizer)), spec, max_tokens)
    corpus = [open_table(item["file"]).read_row_group(item["group"]) for item in batch.to_pylist()]
    return render_documents(pa.concat_tables(corpus), renderer)


def write_window(sequences: pa.Table, *, spec: BackboneSpec, max_tokens: int, uri: str) -> pa.Table:
    """Packs a window and writes it to one file, named after its first piece: a retried task writes the same file again."""
    packed = pack_sequences(sequences, spec, max_tokens)
    name = f"rows/part-{sequences['piece_id'][0].as_py().replace(':', '-')}.parquet"
    with table_writer(storage.join(uri, name), PACKED, ROWS_PER_GROUP) as writer:
        writer.write(packed)
    rows = packed["input_ids"].to_pylist()
    summary = {
        "file": name,
        "rows": packed.num_rows,
        "pieces": sequences.num_rows,
        "tokens": sum(map(len, rows)),
        "image_tokens": sum(row.count(spec.image_token_id) for row in rows),
        "cost_flops": sum(packed["cost_flops"].to_pylist()),
    }
    return pa.Table.from_pylist([summary])
