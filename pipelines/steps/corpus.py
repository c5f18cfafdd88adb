"""corpus: raw documents of any layout to one validated Corpus. Ray Data tasks read, bound and validate unit by unit."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import pyarrow as pa

from cluster import storage
from cluster.batch import run_units
from moca_core import sources
from moca_core.data.image_files import ImageBounds
from moca_core.data.quality import TextBounds
from moca_core.data.schema import CORPUS, GROUPS, KEYS, documents_to_table, keys_to_table
from moca_core.data.validate import valid_documents
from moca_core.types import Document
from pipelines.mixture import Part, Unit, read_mixture
from pipelines.pictures.counts import count_bars
from pipelines.rejections import check_fraction, check_rejected, quarantine
from pipelines.runner.step import Context, Step
from pipelines.sources import Source, check_layouts, check_mixture, names, targets
from pipelines.tables import table_writer

GROUP_DOCUMENTS = 64  # of a row group, or less where they are large
GROUP_BYTES = 16 * 2**20
KEYS_PER_GROUP = 2**16


@dataclass(frozen=True)
class CorpusConfig:
    """Which documents, how many of each source, and what is too broken or too poor to take.

    `max_rows` is shared out by the sources' weights; `seed` draws what is read of a source that is not read whole. With
    `drop_bad_images` a document goes in without its images that cannot be used, and they are counted; else it is rejected.
    """

    sources: tuple[Source, ...]
    max_rows: int | None = None
    seed: int = 0
    bounds: ImageBounds = ImageBounds()
    text: TextBounds = TextBounds()
    drop_bad_images: bool = False
    max_rejected_fraction: float = 0.2

    def __post_init__(self) -> None:
        check_layouts("corpus.sources", self.sources, sources.DOCUMENTS)
        check_mixture("corpus", self.sources, self.max_rows)
        check_fraction("corpus.max_rejected_fraction", self.max_rejected_fraction)


def corpus_step(config: CorpusConfig) -> Step:
    return Step("corpus", run, config, code_version=4, resumable=True)


def run(context: Context) -> dict:
    """Result: {"groups": path of a table of row groups, "parts", "documents", "keys", "sources": [name], "rejected": {reason: count}}."""
    config: CorpusConfig = context.config
    listed = [source.adapter(sources.DOCUMENTS).list_units(source.location()) for source in config.sources]
    context.say(f"{sum(map(len, listed))} units in {len(listed)} source(s)")

    def read(units: list[Unit]) -> list[dict]:
        task = partial(read_unit, units=units, config=config, uri=context.uri)
        return run_units(task, len(units), state_uri=context.path("state"), say=context.say)

    parts = read_mixture(listed, targets(config.sources, config.max_rows), config.seed, read)
    rejected = Counter()
    for part in parts:
        rejected.update(part.result["rejected"])
    documents = sum(part.used for part in parts)
    context.run.log_metrics({"documents": documents, "rejected": sum(rejected.values())})
    context.run.log_metrics({f"rejected/{reason}": count for reason, count in rejected.items()})
    context.say(f"{documents} documents, {sum(rejected.values())} rejected")
    for reason, count in rejected.most_common():
        context.say(f"rejected {count}: {reason}")
    context.keep("documents.png", count_bars("documents read, and refused", {"used": documents}, rejected))
    check_rejected("corpus", documents, rejected, config.max_rejected_fraction)
    for source in config.sources:
        context.run.log_dataset(source.layout, source.path or "builtin", source.identity()["content"], "corpus")
    with table_writer(context.path("groups.parquet"), GROUPS, None) as writer:
        writer.write(group_table(parts))
    return {
        "groups": "groups.parquet",
        "parts": len(parts),
        "documents": documents,
        "keys": sum(part.result["keys"] for part in parts),
        "sources": names(config.sources),
        "rejected": dict(sorted(rejected.items())),
    }


def group_table(parts: list[Part]) -> pa.Table:
    """GROUPS of what is used of every part: the last group of a part that a limit cuts holds fewer documents than its file."""
    rows = []
    for part in parts:
        left = part.used
        for number, (documents, size_bytes) in enumerate(part.result["groups"]):
            if left > 0:
                used = min(left, documents)
                place = {"part": part.number, "group": number, "source": part.source}
                rows.append({**place, "first_row": part.used - left, "documents": used, "bytes": size_bytes})
                left -= used
    return pa.Table.from_pylist(rows, schema=GROUPS)


def read_unit(number: int, *, units: list[Unit], config: CorpusConfig, uri: str) -> dict:
    """Reads one unit into one part of the Corpus, its keys beside it, and what it rejects into a table of its own."""
    unit = units[number]
    source = config.sources[unit.source]
    entries = source.adapter(sources.DOCUMENTS).read_unit(source.location(), unit.unit)
    entries = valid_documents(entries, config.bounds, text_bounds=config.text, drop_images=config.drop_bad_images)
    groups = []
    with (
        quarantine(uri, number) as aside,
        table_writer(part_uri(uri, "documents", number), CORPUS, None) as documents,
        table_writer(part_uri(uri, "keys", number), KEYS, KEYS_PER_GROUP) as keys,
    ):
        for group in row_groups(islice(aside.sift(entries), unit.limit)):
            keys.write(keys_to_table(group, documents.rows))
            table = documents_to_table(group)
            documents.write(table)
            groups.append([len(group), table.nbytes])
    return {"rows": documents.rows, "keys": keys.rows, "groups": groups, "rejected": dict(aside.counts)}


def row_groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Neighbours, as many as fit a row group by number and by bytes; a larger document is alone."""
    group: list[Document] = []
    held_bytes = 0
    for document in documents:
        size_bytes = sum(len(s.image if s.text is None else s.text) for s in document.content)
        if group and (len(group) == GROUP_DOCUMENTS or held_bytes + size_bytes > GROUP_BYTES):
            yield group
            group, held_bytes = [], 0
        group.append(document)
        held_bytes += size_bytes
    if group:
        yield group


def part_uri(uri: str, kind: str, number: int) -> str:
    return storage.join(uri, kind, f"part-{number:05d}.parquet")
