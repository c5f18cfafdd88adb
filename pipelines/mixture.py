"""The mixture: how much of every source is read, without reading what is not used, and what it came to hold."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moca_core.rng import generator


@dataclass(frozen=True)
class Unit:
    """A piece of a source to be read by one task: the source's place in the recipe, the adapter's unit, the most rows to take."""

    source: int
    unit: dict[str, Any]
    limit: int | None


@dataclass(frozen=True)
class Part:
    """What came of a unit: `used` rows of those that it gave, and all that its task said."""

    number: int
    source: int
    used: int
    result: dict[str, Any]


def read_mixture(
    units: Sequence[list[dict[str, Any]]],
    targets: Sequence[int | None],
    seed: int,
    run: Callable[[list[Unit]], list[dict[str, Any]]],
) -> list[Part]:
    """Reads every source up to its target, all of it where the target is None.

    `units` of each source; `run(all units chosen so far)` returns their results, of which "rows" is what a unit gave: it is asked
    again with a longer list until no source wants more, and must not repeat what it did. Of a source with a target, units are
    drawn in an order of the seed, no more than it takes. A pure function of its arguments and of what the sources hold.
    """
    orders = [
        list(generator(seed, number, "units").permutation(len(given))) if target is not None else range(len(given))
        for number, (given, target) in enumerate(zip(units, targets, strict=True))
    ]
    chosen: list[Unit] = []
    taken = [0] * len(units)
    results: list[dict[str, Any]] = []
    while True:
        more = []
        for number, (order, target) in enumerate(zip(orders, targets, strict=True)):
            rows = [r["rows"] for u, r in zip(chosen, results, strict=True) if u.source == number]
            rest = [units[number][k] for k in order[taken[number] :]]
            count = len(rest) if target is None else units_needed(target - sum(rows), rows, rest)
            more += [Unit(number, unit, target) for unit in rest[:count]]
            taken[number] += min(count, len(rest))
        if not more:
            return _cut(chosen, results, targets)
        chosen += more
        results = run(chosen)


def units_needed(wanted: int, rows_so_far: list[int], rest: list[dict[str, Any]]) -> int:
    """How many of the next units to read for `wanted` rows more: by the rows that they announce, else by what units gave so far."""
    if wanted <= 0 or not rest:
        return 0
    if all("rows" in unit for unit in rest):
        announced = 0
        for count, unit in enumerate(rest, 1):
            announced += unit["rows"]
            if announced >= wanted:
                return count
        return len(rest)
    mean = sum(rows_so_far) / len(rows_so_far) if rows_so_far else wanted
    return max(1, -(-wanted // max(1, round(mean))))


def _cut(chosen: list[Unit], results: list[dict[str, Any]], targets: Sequence[int | None]) -> list[Part]:
    parts = []
    left = list(targets)
    for number, (unit, result) in enumerate(zip(chosen, results, strict=True)):
        used, room = result["rows"], left[unit.source]
        if room is not None:
            used = min(used, room)
            left[unit.source] = room - used
        parts.append(Part(number, unit.source, used, result))
    return parts


@dataclass(frozen=True)
class Share:
    """What a source holds of the mixture after cleaning."""

    documents: int = 0
    images: int = 0
    tokens: int = 0
    image_tokens: int = 0

    def __add__(self, other: "Share") -> "Share":
        return Share(*(mine + yours for mine, yours in zip(vars(self).values(), vars(other).values(), strict=True)))


SHOWN = 12  # names below one source; the rest is one line


def tree(by_source: dict[str, dict[str, Share]]) -> str:
    """A table of {source: {name in it: Share}} as a tree, for people: documents, images, tokens and their share."""
    wholes = {source: sum(names.values(), Share()) for source, names in by_source.items()}
    total = sum(wholes.values(), Share())
    lines = [("mixture", total)]
    for k, (source, names) in enumerate(by_source.items()):
        last = k == len(by_source) - 1
        lines.append((f"{'└─' if last else '├─'} {source}", wholes[source]))
        shown = most(names)
        if len(shown) > 1:
            stem = "   " if last else "│  "
            lines += [
                (f"{stem}{'└─' if n == len(shown) - 1 else '├─'} {name}", share)
                for n, (name, share) in enumerate(shown)
            ]
    width = max(len(name) for name, _ in lines)
    header = f"{'':<{width}}  {'documents':>11}  {'images':>11}  {'tokens':>15}  {'of images':>9}  {'share':>7}"
    rows = [
        f"{name:<{width}}  {s.documents:>11,}  {s.images:>11,}  {s.tokens:>15,}  "
        f"{s.image_tokens / max(1, s.tokens):>9.1%}  {s.tokens / max(1, total.tokens):>7.1%}"
        for name, s in lines
    ]
    return "\n".join([header, *rows])


def most(names: dict[str, Share]) -> list[tuple[str, Share]]:
    """The names with most tokens first, what is beyond SHOWN of them as one."""
    ordered = sorted(names.items(), key=lambda item: (-item[1].tokens, item[0]))
    if len(ordered) <= SHOWN:
        return ordered
    rest = sum((share for _, share in ordered[SHOWN - 1 :]), Share())
    return [*ordered[: SHOWN - 1], (f"{len(ordered) - SHOWN + 1} more", rest)]
