"""The built-in pairs: four retrieval tasks, each with training pairs and held-out queries.

    digit_to_name     scan of a digit          -> "the digit seven"
    text_to_plot      description of a plot    -> the plot; one group for each combination of table, kind and columns
    summary_to_text   summary of a function    -> the rest of its documentation; half of the pairs have hard negatives
    summary_to_page   summary of a function    -> its documentation as the picture of a page (the hard one: reading)

Evaluation asks about scans, drawings and functions that are in no training pair and in no document of the corpus. What
training does share with it are the ten names of the digits and the words of the plots' descriptions.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from moca_core.sources.builtin.digits import NAMES, digit_image, held_out_digits, training_digits
from moca_core.sources.builtin.docs import PACKAGES, Entry, held_out_entries, training_entries
from moca_core.sources.builtin.pages import page_image
from moca_core.sources.builtin.plots import (
    COMBINATIONS,
    DESCRIPTIONS_PER_COMBINATION,
    Combination,
    description,
    plot_image,
    sample_rows,
)
from moca_core.sources.builtin.prose import shorten
from moca_core.sources.builtin.split import rng_of, stable_hash
from moca_core.types import Content, EvalTask, Pair, Query, Segment

# Training pairs: enough for a few epochs of the CPU demo, in the proportions in which it should see the tasks.
DIGIT_PAIRS = 1500
PLOT_VARIANTS = 50  # of each of the 40 combinations: 2000 pairs
PLOT_UNITS = 2
TEXTS_PER_PACKAGE = 220  # about 1700 pairs
PAGES_PER_PACKAGE = 40  # 320 pairs: a batch of pages costs as much as three of the others
ANSWER_CHARS = 300
HARD_NEGATIVES = 2  # at most, for about half of the summary_to_text pairs
_WITH_NEGATIVES_PERCENT = 60  # of the pairs: some of these have no neighbours to take them from

# Evaluation: 150 queries keep the error of a precision below 4 points.
EVAL_DIGITS = 150
EVAL_TEXTS = 150
EVAL_PAGES = 100  # candidates are pictures of 80 tokens each


def list_units(location: None = None) -> list[dict[str, Any]]:
    """One unit for every package, some for the plots, one for the digits. `location` is unused."""
    packages = [{"kind": "package", "package": package} for package in PACKAGES]
    plots = [{"kind": "plots", "part": part, "parts": PLOT_UNITS} for part in range(PLOT_UNITS)]
    return [*packages, *plots, {"kind": "digits"}]


def read_pairs(location: None, unit: dict[str, Any]) -> Iterator[Pair]:
    """The training pairs of one unit; those of a package are of two tasks, one after the other."""
    for number, entry in enumerate(_pairs(unit)):
        yield replace(entry, where=f"builtin {' '.join(map(str, unit.values()))} row {number}")


def _pairs(unit: dict[str, Any]) -> Iterator[Pair]:
    if unit["kind"] == "package":
        entries = training_entries(unit["package"])
        yield from _text_pairs(entries[:TEXTS_PER_PACKAGE])
        for entry in entries[:PAGES_PER_PACKAGE]:
            yield Pair("summary_to_page", _text(entry.query), (_image(page_image(entry)),))
    elif unit["kind"] == "plots":
        for combination in COMBINATIONS[unit["part"] :: unit["parts"]]:
            for variant in range(PLOT_VARIANTS):
                said = description(combination, variant % DESCRIPTIONS_PER_COMBINATION)
                answer = _image(_plot(combination, "training", variant))
                yield Pair("text_to_plot", _text(said), (answer,), group=combination.name)
    elif unit["kind"] == "digits":
        for digit in training_digits()[:DIGIT_PAIRS]:
            yield Pair("digit_to_name", _image(digit_image(digit)), (_digit_answer(digit.label),), group=digit.name)
    else:
        raise ValueError(f"not a unit of the built-in pairs: {unit!r}")


def read_tasks(location: None = None) -> Iterator[EvalTask]:
    """The four held-out tasks, named as the sources of the pairs. Queries are asked against all candidates."""
    scans = held_out_digits()[:EVAL_DIGITS]
    yield EvalTask(
        "digit_to_name",
        tuple(Query(_image(digit_image(digit)), (digit.label,)) for digit in scans),
        tuple(_digit_answer(label) for label in range(len(NAMES))),
    )
    yield EvalTask(
        "text_to_plot",
        tuple(
            Query(_text(description(combination, paraphrase)), (position,))
            for position, combination in enumerate(COMBINATIONS)
            for paraphrase in range(DESCRIPTIONS_PER_COMBINATION)
        ),
        tuple(_image(_plot(combination, "held-out", 0)) for combination in COMBINATIONS),
    )
    entries = held_out_entries()
    yield EvalTask(
        "summary_to_text",
        tuple(Query(_text(entry.query), (position,)) for position, entry in enumerate(entries[:EVAL_TEXTS])),
        tuple(_text(_answer(entry)) for entry in entries[:EVAL_TEXTS]),
    )
    yield EvalTask(
        "summary_to_page",
        tuple(Query(_text(entry.query), (position,)) for position, entry in enumerate(entries[:EVAL_PAGES])),
        tuple(_image(page_image(entry)) for entry in entries[:EVAL_PAGES]),
    )


def _text_pairs(entries: list[Entry]) -> Iterator[Pair]:
    """Every entry as a pair; about half of them with the bodies of one or two neighbours of their module as wrong."""
    modules: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        modules[entry.module].append(entry)
    for entry in entries:
        neighbours = [other for other in modules[entry.module] if other is not entry]
        negatives: list[Entry] = []
        if stable_hash("has negatives", entry.name) % 100 < _WITH_NEGATIVES_PERCENT and neighbours:
            rng = rng_of("negatives", entry.name)
            count = min(len(neighbours), 1 + int(rng.integers(HARD_NEGATIVES)))
            negatives = [neighbours[i] for i in rng.choice(len(neighbours), size=count, replace=False)]
        wrong = tuple(_text(_answer(other)) for other in negatives)
        yield Pair("summary_to_text", _text(entry.query), (_text(_answer(entry)),), wrong)


def _answer(entry: Entry) -> str:
    return shorten(entry.body, ANSWER_CHARS)


def _plot(combination: Combination, role: str, variant: int) -> bytes:
    rng = rng_of("plot", role, combination.name, variant)
    return plot_image(combination, sample_rows(combination, rng), rng)


def _digit_answer(label: int) -> Content:
    return _text(f"the digit {NAMES[label]}")


def _text(text: str) -> Content:
    return (Segment(text=text),)


def _image(image: bytes) -> Content:
    return (Segment(image=image),)
