"""pack: the cleaned Corpus to PackedCorpus. Ray Data tasks render documents to tokens and pack them into rows of one token budget."""

from dataclasses import dataclass
from functools import partial

import pyarrow as pa

from cluster import storage
from cluster.batch import run_units
from moca_core.data.render import Renderer, load_tokenizer
from moca_core.data.rows import document_sequences, pack_sequences
from moca_core.data.schema import INDEX, PACKED
from moca_core.rng import generator
from moca_core.spec import BackboneSpec
from pipelines.cleaned import CleanedCorpus, Group
from pipelines.mixture import Share, tree
from pipelines.pictures.mixture import mixture_bars
from pipelines.runner.step import Context, Step
from pipelines.tables import table_writer

ROWS_PER_GROUP = 1  # a packed row is fetched alone: it is a micro-batch
MIN_FILL = 0.97
WINDOW_BYTES = 256 * 2**20  # of encoded images and text that one task holds


@dataclass(frozen=True)
class PackConfig:
    """`max_tokens` is the longest piece of a document, `row_tokens` the budget of a row (null: as long as the longest piece). Rows of
    several pieces are the fuller: two images of 1,024 tokens do not fit 2,048, and six leave room for text in 8,192.

    About `window` documents are packed together, drawn from all over the corpus in an order of `seed`; fewer where they are large.
    """

    max_tokens: int = 2048
    row_tokens: int | None = None
    window: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 8 or self.window < 1:
            raise ValueError(
                f"pack.max_tokens={self.max_tokens} must be at least 8 and pack.window={self.window} at least 1"
            )
        if self.row_tokens is not None and self.row_tokens < self.max_tokens:
            raise ValueError(f"pack.row_tokens={self.row_tokens} must be at least pack.max_tokens={self.max_tokens}")

    @property
    def budget_tokens(self) -> int:
        return self.row_tokens or self.max_tokens


def pack_step(config: PackConfig) -> Step:
    return Step("pack", run, config, needs=("corpus", "clean", "base"), code_version=2, resumable=True)


def run(context: Context) -> dict:
    """Result: {"files": [[path, rows]], "index": path, "rows", "pieces", "tokens", "image_tokens", "cost_flops", "emptied", "fill",
    "mixture": {source: {name: share}}}."""
    config: PackConfig = context.config
    corpus, base = context.inputs["corpus"], context.inputs["base"]
    spec = BackboneSpec.from_dict(base.result["spec"])
    Renderer(None, spec, config.max_tokens)  # refuses a budget that cannot hold an image, before any work
    cleaned = CleanedCorpus.of(corpus, context.inputs["clean"])
    windows = deal(cleaned.groups(), config)
    task = partial(
        pack_window,
        windows=windows,
        cleaned=cleaned,
        tokenizer=base.path(base.result["tokenizer"]),
        spec=spec,
        config=config,
        uri=context.uri,
    )
    context.say(f"rendering {corpus.result['documents']} documents in {len(windows)} windows")
    results = run_units(task, len(windows), state_uri=context.path("state"), say=context.say)
    files = [[window_file(number), len(result["tokens"])] for number, result in enumerate(results) if result["tokens"]]
    with table_writer(context.path("index.parquet"), INDEX, None) as writer:
        writer.write(index_table([result for result in results if result["tokens"]]))
    mixture = add_up(corpus.result["sources"], [result["mixture"] for result in results])
    report(context, mixture)
    totals = {
        "rows": sum(rows for _, rows in files),
        "pieces": sum(result["pieces"] for result in results),
        "tokens": sum(sum(result["tokens"]) for result in results),
        "image_tokens": sum(share.image_tokens for names in mixture.values() for share in names.values()),
        "cost_flops": sum(sum(result["cost_flops"]) for result in results),
    }
    if not totals["rows"]:
        raise ValueError("pack: the cleaning left no document; see the counts of the clean step")
    documents = sum(share.documents for names in mixture.values() for share in names.values())
    emptied = corpus.result["documents"] - cleaned.dropped_documents() - documents
    if emptied:
        context.say(f"{emptied} documents had nothing but images that the cleaning took out")
    fill = totals["tokens"] / (totals["rows"] * config.budget_tokens)
    context.say(f"{totals['rows']} rows of {config.budget_tokens} tokens, {fill:.1%} full")
    if fill < MIN_FILL:
        context.say(f"below {MIN_FILL:.0%}: the corpus or pack.window is small for rows of that length")
    context.run.log_metrics({**totals, "fill": fill})
    context.run.log_dataset("corpus", corpus.uri, corpus.uri.rsplit("/", 1)[-1], "pack")
    plain = {source: {name: vars(share) for name, share in names.items()} for source, names in mixture.items()}
    return {
        "files": files,
        "rows_per_group": ROWS_PER_GROUP,
        "index": "index.parquet",
        **totals,
        "emptied": emptied,
        "fill": fill,
        "mixture": plain,
    }


def deal(groups: list[Group], config: PackConfig) -> list[list[Group]]:
    """Row groups to windows of about equal load: the whole corpus mixed, none larger than a task can hold."""
    load = [max(group.documents / config.window, group.bytes / WINDOW_BYTES) for group in groups]
    count = max(1, round(sum(load)))
    windows: list[list[Group]] = [[] for _ in range(count)]
    passed = 0.0
    for place in generator(config.seed, "windows").permutation(len(groups)):
        windows[min(count - 1, int(passed / sum(load) * count))].append(groups[place])
        passed += load[place]
    return [window for window in windows if window]


def pack_window(
    number: int,
    *,
    windows: list[list[Group]],
    cleaned: CleanedCorpus,
    tokenizer: str,
    spec: BackboneSpec,
    config: PackConfig,
    uri: str,
) -> dict:
    """Renders and packs one window into one file. {"tokens": [of a row], "cost_flops": [of a row], "pieces", "mixture"}."""
    renderer = Renderer(load_tokenizer(storage.localize(tokenizer)), spec, config.max_tokens)
    sequences: list[dict] = []
    mixture: dict[int, dict[str, Share]] = {}
    for group in windows[number]:
        for document in cleaned.read(group):
            pieces = document_sequences(document, renderer)
            names = mixture.setdefault(group.source, {})
            names[document.source] = names.get(document.source, Share()) + share_of(pieces, spec)
            sequences += pieces
    rows = pack_sequences(sequences, spec, config.budget_tokens)
    if rows:
        with table_writer(storage.join(uri, window_file(number)), PACKED, ROWS_PER_GROUP) as writer:
            for row in rows:
                writer.write(pa.Table.from_pylist([row], schema=PACKED))
    return {
        "tokens": [len(row["input_ids"]) for row in rows],
        "cost_flops": [row["cost_flops"] for row in rows],
        "pieces": len(sequences),
        "mixture": [[source, name, vars(share)] for source, names in mixture.items() for name, share in names.items()],
    }


def share_of(pieces: list[dict], spec: BackboneSpec) -> Share:
    """What one document adds to the mixture."""
    grids = [grid for piece in pieces for grid in piece["grid_thw"]]
    tokens = sum(len(piece["input_ids"]) for piece in pieces)
    return Share(1, len(grids), tokens, sum(map(spec.image_tokens, grids)))


def window_file(number: int) -> str:
    return f"rows/part-{number:05d}.parquet"


def index_table(results: list[dict]) -> pa.Table:
    """INDEX: one line per packed row, in the order of files and rows."""
    rows = [
        {"file": file, "row": row, "tokens": tokens, "cost_flops": cost}
        for file, result in enumerate(results)
        for row, (tokens, cost) in enumerate(zip(result["tokens"], result["cost_flops"], strict=True))
    ]
    return pa.Table.from_pylist(rows, schema=INDEX)


def add_up(sources: list[str], windows: list[list]) -> dict[str, dict[str, Share]]:
    """{source of the recipe: {name in it: Share}} over all windows."""
    mixture: dict[str, dict[str, Share]] = {source: {} for source in sources}
    for source, name, share in (entry for window in windows for entry in window):
        names = mixture[sources[source]]
        names[name] = names.get(name, Share()) + Share(**share)
    return mixture


def report(context: Context, mixture: dict[str, dict[str, Share]]) -> None:
    """The mixture on the screen, and in MLflow as a text, a plot and a metric for every source."""
    text = tree(mixture)
    for line in text.splitlines():
        context.say(line)
    for name, data in (("mixture.txt", f"{text}\n".encode()), ("mixture.png", mixture_bars(mixture))):
        context.keep(name, data)
    tokens = {source: sum(share.tokens for share in names.values()) for source, names in mixture.items()}
    context.run.log_metrics(
        {f"mixture/{source}": count / max(1, sum(tokens.values())) for source, count in tokens.items()}
    )
