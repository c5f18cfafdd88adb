"""corpus: raw documents of any layout to one validated Corpus. A Ray Data stage reads and validates, file by file."""

from collections import Counter
from dataclasses import dataclass
from functools import partial

from cluster import storage
from moca_core import sources
from moca_core.data.images import ImageBounds
from moca_core.data.schema import CORPUS, documents_to_table
from moca_core.data.validate import valid_documents
from moca_core.types import Document, Rejected
from pipelines.rejections import check_fraction, check_rejected, write_rejected
from pipelines.runner.step import Context, Step
from pipelines.sources import Source, check_layouts
from pipelines.tables import batched, table_writer

ROWS_PER_GROUP = 64


@dataclass(frozen=True)
class CorpusConfig:
    """Which documents, and what is too broken to take. A whole document is rejected if one of its images cannot be used."""

    sources: tuple[Source, ...]
    bounds: ImageBounds = ImageBounds()
    max_rejected_fraction: float = 0.2

    def __post_init__(self) -> None:
        check_layouts("corpus.sources", self.sources, sources.DOCUMENTS)
        check_fraction("corpus.max_rejected_fraction", self.max_rejected_fraction)


def corpus_step(config: CorpusConfig) -> Step:
    return Step("corpus", run, config)


def run(context: Context) -> dict:
    """Result: {"files": [[path, documents]], "documents", "images", "sources", "rejected": {reason: count}}."""
    import ray.data

    config: CorpusConfig = context.config
    units = []
    for source in config.sources:
        adapter = source.adapter(sources.DOCUMENTS)
        units += [{"source": source, "unit": unit} for unit in adapter.list_units(*source.open())]
    context.say(f"reading {len(units)} units of {len(config.sources)} source(s)")
    items = [{"number": number} for number in range(len(units))]
    dataset = ray.data.from_items(items, override_num_blocks=len(units))
    dataset = dataset.map(partial(read_unit, units=units, bounds=config.bounds, uri=context.uri))
    files, rejected, by_source = [], Counter(), Counter()
    images = 0
    for done, row in enumerate(dataset.iter_rows(), 1):
        files += [[row["file"], row["documents"]]] if row["documents"] else []
        images += row["images"]
        rejected.update(dict(zip(row["reasons"], row["reason_counts"], strict=True)))
        by_source.update(dict(zip(row["source_names"], row["source_counts"], strict=True)))
        if done % max(1, len(units) // 5) == 0:
            context.say(
                f"{done}/{len(units)} units, {sum(n for _, n in files)} documents, {sum(rejected.values())} rejected"
            )
    documents = sum(count for _, count in files)
    context.run.log_metrics({"documents": documents, "images": images, "rejected": sum(rejected.values())})
    context.run.log_metrics({f"rejected/{reason}": count for reason, count in rejected.items()})
    for reason, count in rejected.most_common():
        context.say(f"rejected {count}: {reason}")
    check_rejected("corpus", documents, rejected, config.max_rejected_fraction)
    for source in config.sources:
        identity = source.identity()
        context.run.log_dataset(source.layout, source.path or "builtin", identity["content"], "corpus")
    return {
        "files": files,
        "rows_per_group": ROWS_PER_GROUP,
        "documents": documents,
        "images": images,
        "sources": dict(sorted(by_source.items())),
        "rejected": dict(sorted(rejected.items())),
    }


def read_unit(item: dict, *, units: list[dict], bounds: ImageBounds, uri: str) -> dict:
    """Reads one unit into one Corpus file, and what it rejects into a file beside it."""
    number = item["number"]
    source, unit = units[number]["source"], units[number]["unit"]
    fs, _ = source.open()
    name = f"documents/part-{number:05d}.parquet"
    rejected: list[Rejected] = []
    by_source: Counter[str] = Counter()
    images = 0

    def accepted():
        for entry in valid_documents(source.adapter(sources.DOCUMENTS).read_unit(fs, unit), bounds):
            if isinstance(entry, Rejected):
                rejected.append(entry)
            else:
                yield entry

    with table_writer(storage.join(uri, name), CORPUS, ROWS_PER_GROUP) as writer:
        for documents in batched(accepted(), ROWS_PER_GROUP):
            writer.write(documents_to_table(documents))
            by_source.update(d.source for d in documents)
            images += sum(count_images(d) for d in documents)
    return {
        "file": name,
        "documents": writer.rows,
        "images": images,
        "source_names": list(by_source),
        "source_counts": list(by_source.values()),
        **write_rejected(uri, number, rejected),
    }


def count_images(document: Document) -> int:
    return sum(segment.image is not None for segment in document.content)
