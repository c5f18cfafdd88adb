"""Rows that cannot be used: kept aside with their reason, counted, and too many of them an error."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from cluster import storage
from moca_core.data import quality
from moca_core.data.schema import REJECTED, rejected_to_table
from moca_core.data.validate import DROPPED
from moca_core.types import Rejected
from pipelines.tables import table_writer

ROWS_PER_GROUP = 64
LEAKED = "pair_in_evaluation"
UNWANTED = (*quality.REASONS, LEAKED)  # good data that is not taken: no reason to stop
Item = TypeVar("Item")


class Quarantine:
    """The rejections of one unit: `sift` passes on everything else."""

    def __init__(self, write) -> None:
        self._write = write
        self.counts: Counter[str] = Counter()

    def sift(self, items: Iterable[Item | Rejected]) -> Iterator[Item]:
        for item in items:
            if isinstance(item, Rejected):
                self.counts[item.reason] += 1
                self._write(rejected_to_table([item]))
            else:
                yield item


@contextmanager
def quarantine(uri: str, number: int) -> Iterator[Quarantine]:
    """Keeps what unit `number` of a step rejects below `uri`, in a table with reason, detail and place; no table where there is nothing."""
    target = storage.join(uri, f"rejected/part-{number:05d}.parquet")
    with table_writer(target, REJECTED, ROWS_PER_GROUP) as aside:
        yield Quarantine(aside.write)
    if not aside.rows:
        storage.delete(target)


def check_fraction(name: str, value: float) -> None:
    """Raises ValueError unless `value` can be the largest fraction of rejected rows."""
    if not 0 <= value < 1:
        raise ValueError(f"{name}={value} must be at least 0 and below 1")


def rejected_rows(counts: Mapping[str, int]) -> dict[str, int]:
    """Those that are rows: an image that was dropped is none, as its document went on without it."""
    return {reason: count for reason, count in counts.items() if not reason.startswith(DROPPED)}


def check_rejected(what: str, accepted: int, counts: Mapping[str, int], most: float) -> None:
    """Raises ValueError where more than the stated fraction was broken, or nothing is left. What is only unwanted is not broken."""
    rejected = rejected_rows(counts)
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(rejected.items(), key=lambda r: -r[1]))
    if accepted == 0:
        raise ValueError(
            f"{what}: nothing usable in {sum(rejected.values())} rows ({reasons or 'the sources are empty'})"
        )
    bad = sum(count for reason, count in rejected.items() if reason not in UNWANTED)
    if bad > most * (accepted + bad):
        raise ValueError(
            f"{what}: {bad} of {accepted + bad} rows rejected ({reasons}), more than max_rejected_fraction={most}; "
            "mend the source, or raise the fraction if that is how it is"
        )
