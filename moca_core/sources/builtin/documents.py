"""The built-in corpus: documentation as text, pages with their text, plots with what they show, digits in sentences.

Sources: builtin/docs, builtin/pages, builtin/plots, builtin/digits. A document depends on its own number or
name alone, so units can be read in any order and by any number of processes. Held-out content never gets here.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from moca_core.sources.builtin.digits import NAMES, digit_image, training_digits
from moca_core.sources.builtin.docs import PACKAGES, Entry, training_entries
from moca_core.sources.builtin.pages import PAGE_TEXT_CHARS, page_image
from moca_core.sources.builtin.plots import (
    COMBINATIONS,
    DESCRIPTIONS_PER_COMBINATION,
    Combination,
    description,
    plot_image,
    sample_rows,
)
from moca_core.sources.builtin.prose import shorten
from moca_core.sources.builtin.split import rng_of
from moca_core.types import Document, Segment

# Together about 600 thousand tokens, a fifth of them image tokens: what the CPU demo can read in its minutes.
PAGES_PER_PACKAGE = 120
TEXTS_PER_PACKAGE = 140
TEXT_CHARS = 1200  # of one text document, about 340 tokens
PLOT_DOCUMENTS = 800
PLOT_UNITS = 4
DIGIT_DOCUMENTS = 500
DIGITS_PER_DOCUMENT = (4, 10)

_ROWS_SHOWN = 3  # rows of the table that a plot document quotes
_COLUMNS_SHOWN = 4


def list_units(location: None = None) -> list[dict[str, Any]]:
    """One unit for every package, some for the plots, one for the digits. `location` is unused."""
    packages = [{"kind": "package", "package": package} for package in PACKAGES]
    plots = [{"kind": "plots", "part": part, "parts": PLOT_UNITS} for part in range(PLOT_UNITS)]
    return [*packages, *plots, {"kind": "digits"}]


def read_unit(location: None, unit: dict[str, Any]) -> Iterator[Document]:
    """The documents of one unit: about 260 of a package, 200 with plots, or all 500 with digits."""
    for number, entry in enumerate(_documents(unit)):
        yield replace(entry, where=f"builtin {' '.join(map(str, unit.values()))} row {number}")


def _documents(unit: dict[str, Any]) -> Iterator[Document]:
    if unit["kind"] == "package":
        yield from _package_documents(unit["package"])
    elif unit["kind"] == "plots":
        for number in range(unit["part"], PLOT_DOCUMENTS, unit["parts"]):
            yield Document("builtin/plots", _plot_document(number))
    elif unit["kind"] == "digits":
        for number in range(DIGIT_DOCUMENTS):
            yield Document("builtin/digits", _digit_document(number))
    else:
        raise ValueError(f"not a unit of the built-in corpus: {unit!r}")


def _package_documents(package: str) -> Iterator[Document]:
    entries = training_entries(package)
    for entry in entries[:PAGES_PER_PACKAGE]:
        text = shorten(_full_text(entry), PAGE_TEXT_CHARS)
        yield Document("builtin/pages", (Segment(image=page_image(entry)), Segment(text=text)))
    for entry in entries[PAGES_PER_PACKAGE : PAGES_PER_PACKAGE + TEXTS_PER_PACKAGE]:
        yield Document("builtin/docs", (Segment(text=shorten(_full_text(entry), TEXT_CHARS)),))


def _full_text(entry: Entry) -> str:
    return f"{entry.name}\n{entry.summary}\n{entry.body}"


def _plot_document(number: int) -> tuple[Segment, ...]:
    """One or two plots of a table with descriptions, statistics and a few rows, in one of four orders."""
    rng = rng_of("plot document", number)
    combination = COMBINATIONS[rng.integers(len(COMBINATIONS))]
    rows = sample_rows(combination, rng)
    said = description(combination, int(rng.integers(DESCRIPTIONS_PER_COMBINATION)))
    image = Segment(image=plot_image(combination, rows, rng))
    numbers, quoted = _statistics(combination, rows, rng), _quoted_rows(combination, rows, rng)
    form = rng.integers(4)
    if form == 0:
        return image, Segment(text=f"{said}\n{numbers}\n{quoted}")
    if form == 1:
        return Segment(text=said), image, Segment(text=f"{numbers}\n{quoted}")
    if form == 2:
        return Segment(text=f"{quoted}\n{numbers}"), image, Segment(text=said)
    siblings = [other for other in COMBINATIONS if other.table_key == combination.table_key and other != combination]
    second = siblings[rng.integers(len(siblings))]
    second_rows = sample_rows(second, rng)
    second_said = description(second, int(rng.integers(DESCRIPTIONS_PER_COMBINATION)))
    second_image = Segment(image=plot_image(second, second_rows, rng))
    numbers_too = _statistics(second, second_rows, rng)
    return Segment(text=said), image, Segment(text=f"{numbers}\n{second_said}"), second_image, Segment(text=numbers_too)


def _shown_columns(combination: Combination, rng: np.random.Generator) -> list[int]:
    indices = combination.column_indices
    chosen = rng.choice(len(indices), size=min(_COLUMNS_SHOWN, len(indices)), replace=False)
    return [indices[i] for i in sorted(chosen)]


def _statistics(combination: Combination, rows: np.ndarray, rng: np.random.Generator) -> str:
    """Sentences about the very rows that the plot shows."""
    table = combination.table
    sentences = [f"It shows {len(rows)} of {len(table.values)} {table.rows_are}."]
    for index in _shown_columns(combination, rng)[:2]:
        values = table.values[rows, index]
        sentences.append(
            f"The {table.columns[index]} is between {values.min():.4g} and {values.max():.4g}, "
            f"{values.mean():.4g} on average."
        )
    return " ".join(sentences)


def _quoted_rows(combination: Combination, rows: np.ndarray, rng: np.random.Generator) -> str:
    """A few of the rows, one on a line: "setosa: petal length 1.4, petal width 0.2"."""
    table = combination.table
    columns = _shown_columns(combination, rng)
    lines = []
    for row in rng.choice(rows, size=_ROWS_SHOWN, replace=False):
        cells = ", ".join(f"{table.columns[i]} {table.values[row, i]:.4g}" for i in columns)
        lines.append(f"{table.classes[table.labels[row]]}: {cells}")
    return "\n".join(lines)


def _digit_document(number: int) -> tuple[Segment, ...]:
    """Four to ten scans with their names: before each, after each, all at the end, or as a counted list."""
    rng = rng_of("digit document", number)
    scans = training_digits()
    count = int(rng.integers(DIGITS_PER_DOCUMENT[0], DIGITS_PER_DOCUMENT[1] + 1))
    chosen = [scans[i] for i in rng.choice(len(scans), size=count, replace=False)]
    form = rng.integers(4)
    if form == 0:
        opening = ("A handwritten {}:", "The digit {}:", "Here is a {}:")[rng.integers(3)]
        pairs = [(Segment(text=opening.format(digit.name)), Segment(image=digit_image(digit))) for digit in chosen]
        return tuple(segment for pair in pairs for segment in pair)
    if form == 1:
        closing = ("is a handwritten {}.", "is the digit {}.", "shows a {}.")[rng.integers(3)]
        pairs = [(Segment(image=digit_image(digit)), Segment(text=closing.format(digit.name))) for digit in chosen]
        return tuple(segment for pair in pairs for segment in pair)
    if form == 2:
        names = ", ".join(digit.name for digit in chosen)
        images = [Segment(image=digit_image(digit)) for digit in chosen]
        return Segment(text=f"{count} digits written by hand:"), *images, Segment(text=f"From left to right: {names}.")
    # Sorted, so that a reader can infer a name from its neighbours.
    segments = [Segment(text="Handwritten digits from the smallest to the largest.")]
    for digit in sorted(chosen, key=lambda digit: digit.label):
        segments += [Segment(text=f"{NAMES[digit.label]} ({digit.label}):"), Segment(image=digit_image(digit))]
    return tuple(segments)
