"""A PairSet cut into units: few enough pairs to hold in memory, each a run of rows of one file."""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

from moca_core.data.schema import row_to_pair, rows_to_content
from moca_core.types import Content, Pair
from pipelines.runner.record import Artifact
from pipelines.tables import open_table, read_rows

UNIT_PAIRS = 512

Address = tuple[int, int]


@dataclass(frozen=True)
class PairUnit:
    """Pairs `start` to `start + rows` of `task`: the rows from `first` on of the table at `uri`."""

    number: int
    task: str
    uri: str
    first: int
    start: int
    rows: int

    @property
    def pairs(self) -> range:
        """Which pairs of the task these are."""
        return range(self.start, self.start + self.rows)


@dataclass(frozen=True)
class PairUnits:
    """All pairs of a PairSet as units, in order; a task's units stand together."""

    units: tuple[PairUnit, ...]
    rows_per_group: int

    @staticmethod
    def of(pairs: Artifact) -> "PairUnits":
        units: list[PairUnit] = []
        for task, files in pairs.result["train"].items():
            start = 0
            for file, rows in files:
                for first in range(0, rows, UNIT_PAIRS):
                    count = min(UNIT_PAIRS, rows - first)
                    units.append(PairUnit(len(units), task, pairs.path(file), first, start, count))
                    start += count
        return PairUnits(tuple(units), pairs.result["rows_per_group"])

    def of_task(self, task: str) -> list[PairUnit]:
        return [unit for unit in self.units if unit.task == task]

    def read(self, unit: PairUnit) -> list[Pair]:
        rows = read_rows(unit.uri, list(range(unit.first, unit.first + unit.rows)), self.rows_per_group)
        return [row_to_pair(row) for row in rows]

    def answers(self, task: str, addresses: Iterable[Address]) -> dict[Address, Content]:
        """The answers of a task at (pair, place), its positives counted before its negatives; every row group is read once."""
        units = self.of_task(task)
        starts = [unit.start for unit in units]
        by_group: dict[tuple[str, int], list[tuple[int, Address]]] = {}
        for pair, place in addresses:
            unit = units[bisect_right(starts, pair) - 1]
            group, row = divmod(unit.first + pair - unit.start, self.rows_per_group)
            by_group.setdefault((unit.uri, group), []).append((row, (pair, place)))
        found = {}
        for (uri, group), wanted in by_group.items():
            table = open_table(uri).read_row_group(group, columns=["positives", "negatives"])
            for row, (pair, place) in wanted:
                named = table.slice(row, 1).to_pylist()[0]
                found[pair, place] = rows_to_content([*named["positives"], *named["negatives"]][place])
        return found
