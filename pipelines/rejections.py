"""Rows that cannot be used: kept aside with their reason, counted, and too many of them an error."""

from collections import Counter

from cluster import storage
from moca_core.data.schema import REJECTED, rejected_to_table
from moca_core.types import Rejected
from pipelines.tables import table_writer

ROWS_PER_GROUP = 64


def write_rejected(uri: str, number: int, rejected: list[Rejected]) -> dict[str, list]:
    """Keeps what unit `number` of a step rejected below `uri`; returns its {"reasons", "reason_counts"}, two parallel lists."""
    if rejected:
        with table_writer(storage.join(uri, f"rejected/part-{number:05d}.parquet"), REJECTED, ROWS_PER_GROUP) as aside:
            aside.write(rejected_to_table(rejected))
    counts = Counter(r.reason for r in rejected)
    return {"reasons": list(counts), "reason_counts": list(counts.values())}


def check_fraction(name: str, value: float) -> None:
    """Raises ValueError unless `value` can be the largest fraction of rejected rows."""
    if not 0 <= value < 1:
        raise ValueError(f"{name}={value} must be at least 0 and below 1")


def check_rejected(what: str, accepted: int, rejected: dict[str, int], most: float) -> None:
    """Raises ValueError where more than the stated fraction was rejected, or nothing is left."""
    bad = sum(rejected.values())
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(rejected.items(), key=lambda r: -r[1]))
    if accepted == 0:
        raise ValueError(f"{what}: nothing usable in {bad} rows ({reasons or 'the sources are empty'})")
    if bad > most * (accepted + bad):
        raise ValueError(
            f"{what}: {bad} of {accepted + bad} rows rejected ({reasons}), more than max_rejected_fraction={most}; "
            "mend the source, or raise the fraction if that is how it is"
        )
