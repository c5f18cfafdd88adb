"""The built-in corpus is real, the same everywhere, within its size, and keeps its held-out content to itself."""

import hashlib
import io
import os
import subprocess
import sys
from collections import Counter
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import RidgeClassifier

from moca_core.sources import builtin
from moca_core.sources.builtin import documents, pairs
from moca_core.sources.builtin.canvas import PLOT_PX
from moca_core.sources.builtin.digits import DIGIT_PX, NAMES
from moca_core.sources.builtin.docs import PACKAGES, entries, held_out_entries, without_name
from moca_core.sources.builtin.pages import PAGE_PX
from moca_core.sources.builtin.plots import (
    COMBINATIONS,
    DESCRIPTIONS_PER_COMBINATION,
    Combination,
    description,
    plot_image,
    sample_rows,
)
from moca_core.sources.builtin.prose import first_sentence, paragraphs, shorten
from moca_core.sources.builtin.split import rng_of
from moca_core.types import Content, Document, EvalTask, Pair, content_id

ROOT = Path(__file__).parents[2]
SIZES = {"builtin/pages": {PAGE_PX}, "builtin/plots": {PLOT_PX}, "builtin/digits": {DIGIT_PX}, "builtin/docs": set()}


FIRST = 300  # of every unit: all documentation pairs of numpy among them


# One package, some plots and the digits stand for all units: the others come out of the same lines of code.
def _is_sample(unit: dict) -> bool:
    return unit.get("package", "numpy") == "numpy" and unit.get("part", 0) < 1


@lru_cache(maxsize=1)
def corpus() -> list[Document]:
    units = filter(_is_sample, documents.list_units())
    return [document for unit in units for document in islice(documents.read_unit(None, unit), FIRST)]


@lru_cache(maxsize=1)
def training() -> list[Pair]:
    units = filter(_is_sample, pairs.list_units())
    return [pair for unit in units for pair in islice(pairs.read_pairs(None, unit), FIRST)]


@lru_cache(maxsize=1)
def tasks() -> dict[str, EvalTask]:
    return {task.name: task for task in pairs.read_tasks(None)}


def size_of(image: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(image)) as opened:
        opened.load()
        assert opened.format == "PNG"
        return opened.size


def sides(pair: Pair) -> tuple[Content, ...]:
    return (pair.query, *pair.positives, *pair.negatives)


def test_units_name_every_package_and_every_number_once():
    for adapter in (documents, pairs):
        units = adapter.list_units(None)
        assert [unit["package"] for unit in units if unit["kind"] == "package"] == list(PACKAGES)
        parts = [(unit["part"], unit["parts"]) for unit in units if unit["kind"] == "plots"]
        assert parts == [(part, len(parts)) for part in range(len(parts))]
        assert [unit["kind"] for unit in units].count("digits") == 1
        with pytest.raises(ValueError, match="not a unit"):
            list((adapter.read_unit if adapter is documents else adapter.read_pairs)(None, {"kind": "sounds"}))


def test_every_source_is_there_and_no_document_comes_twice():
    assert {document.source for document in corpus()} == set(SIZES)
    assert len({document.doc_id for document in corpus()}) == len(corpus())


def test_documents_hold_images_of_the_stated_size_and_enough_text():
    for document in corpus():
        images = [segment.image for segment in document.content if segment.image is not None]
        assert {size_of(image) for image in images} == SIZES[document.source]
        chars = sum(len(segment.text) for segment in document.content if segment.text is not None)
        assert 40 <= chars <= documents.TEXT_CHARS


def test_documents_are_interleaved_in_more_than_one_way():
    orders = {
        (document.source, "".join("t" if segment.image is None else "i" for segment in document.content)[:4])
        for document in corpus()
    }
    assert {("builtin/plots", order) for order in ("it", "tit", "titi")} <= orders
    assert {("builtin/digits", order) for order in ("titi", "itit", "tiii")} <= orders


def test_the_same_bytes_come_out_of_another_process():
    unit = {"kind": "package", "package": "numpy"}
    plots = documents.list_units()[len(PACKAGES)]
    code = f"""
import hashlib
from itertools import islice
from moca_core.sources.builtin import digest, documents, pairs
from moca_core.types import content_id
read = islice(pairs.read_pairs(None, {unit}), {FIRST})
ids = [content_id(side) for pair in read for side in (pair.query, *pair.positives, *pair.negatives)]
ids += [document.doc_id for document in islice(documents.read_unit(None, {plots}), 40)]
print(digest(), hashlib.sha256(" ".join(ids).encode()).hexdigest())
"""
    # Here the documents come first, and the process has another seed for hash().
    ids = [document.doc_id for document in islice(documents.read_unit(None, plots), 40)]
    read = [pair for pair in training() if pair.source.startswith("summary")]  # of numpy alone
    ids = [content_id(side) for pair in read for side in sides(pair)] + ids
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env, cwd=ROOT)
    assert run.stdout.split() == [builtin.digest(), hashlib.sha256(" ".join(ids).encode()).hexdigest()]


def test_no_package_is_imported_to_read_its_documentation():
    code = """
import sys
from moca_core.sources.builtin.docs import entries
assert entries("networkx")
print([name for name in ("networkx", "torch", "matplotlib", "sklearn") if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "[]"


def test_held_out_content_is_in_no_training_pair_and_in_no_document():
    trained_on = {content_id(side) for pair in training() for side in sides(pair)}
    trained_on |= {content_id((segment,)) for document in corpus() for segment in document.content}
    for name, task in tasks().items():
        if name != "text_to_plot":  # descriptions are shared, drawings are not
            assert trained_on.isdisjoint(content_id(query.content) for query in task.queries)
        if name != "digit_to_name":  # names are shared, scans are not
            assert trained_on.isdisjoint(content_id(candidate) for candidate in task.candidates)


def test_held_out_documentation_is_not_quoted_by_any_package():
    texts = "\n".join(f"{e.summary}\n{e.body}" for name in PACKAGES for e in entries(name) if not e.held_out)
    held_out = held_out_entries()
    assert len(held_out) >= pairs.EVAL_TEXTS
    assert not [entry.name for entry in held_out if entry.body[:200] in texts]


def test_every_task_has_its_answers_among_distinct_candidates():
    assert set(tasks()) == {pair.source for pair in training()}
    for task in tasks().values():
        assert len({content_id(candidate) for candidate in task.candidates}) == len(task.candidates)
        assert len({content_id(query.content) for query in task.queries}) == len(task.queries) >= 100
        for query in task.queries:
            assert len(query.positives) == 1 and query.candidates is None
            assert 0 <= query.positives[0] < len(task.candidates)
    assert {name: len(task.candidates) for name, task in tasks().items()} == {
        "digit_to_name": 10,
        "text_to_plot": len(COMBINATIONS),
        "summary_to_text": pairs.EVAL_TEXTS,
        "summary_to_page": pairs.EVAL_PAGES,
    }


def test_gold_answers_are_of_the_group_that_the_query_asks_for():
    task = tasks()["text_to_plot"]
    asked = {pair.query[0].text: pair.group for pair in training() if pair.source == "text_to_plot"}
    known = [query for query in task.queries if query.content[0].text in asked]
    assert known
    assert all(asked[query.content[0].text] == COMBINATIONS[query.positives[0]].name for query in known)
    names = {pair.positives[0][0].text: pair.group for pair in training() if pair.source == "digit_to_name"}
    assert [names[candidate[0].text] for candidate in tasks()["digit_to_name"].candidates] == list(NAMES)


def test_one_answer_is_never_of_two_groups_nor_its_own_negative():
    groups: dict[str, set[str | None]] = {}
    for pair in training():
        groups.setdefault(content_id(pair.positives[0]), set()).add(pair.group)
        assert content_id(pair.positives[0]) not in {content_id(wrong) for wrong in pair.negatives}
    assert all(len(names) == 1 for names in groups.values())


def test_about_half_of_the_text_pairs_have_hard_negatives():
    counts = Counter(len(pair.negatives) for pair in training() if pair.source == "summary_to_text")
    assert set(counts) == {0, 1, 2}
    assert 0.35 < counts[0] / counts.total() < 0.65
    assert not any(pair.negatives for pair in training() if pair.source != "summary_to_text")


def test_answers_are_short_and_queries_do_not_name_the_function():
    for pair in training():
        if pair.source == "summary_to_text":
            assert 60 <= len(pair.positives[0][0].text) <= pairs.ANSWER_CHARS
            assert len(pair.query[0].text.split()) >= 4
        if pair.source == "summary_to_page":
            assert size_of(pair.positives[0][0].image) == PAGE_PX
    assert without_name("Return numpy.argmax() of an array; ArgMax ignores NaN.", "numpy.argmax") == (
        "Return of an array; ignores NaN."
    )


def test_variants_of_a_combination_look_alike_and_combinations_do_not():
    """A linear classifier on thumbnails finds the combination of an unseen variant: the task can be learnt."""
    thumbnails = np.array([[thumbnail(c, variant) for variant in range(6)] for c in COMBINATIONS])
    labels = np.repeat(np.arange(len(COMBINATIONS)), 5)
    model = RidgeClassifier(30).fit(thumbnails[:, :5].reshape(len(labels), -1), labels)
    unseen = thumbnails[:, 5]
    assert (model.predict(unseen) == np.arange(len(COMBINATIONS))).mean() > 0.85
    said = {description(c, way) for c in COMBINATIONS for way in range(DESCRIPTIONS_PER_COMBINATION)}
    assert len(said) == len(COMBINATIONS) * DESCRIPTIONS_PER_COMBINATION


def thumbnail(combination: Combination, variant: int) -> np.ndarray:
    rng = rng_of("test", combination.name, variant)
    image = Image.open(io.BytesIO(plot_image(combination, sample_rows(combination, rng), rng))).convert("L")
    grey = np.asarray(image.resize((28, 28), Image.Resampling.BOX), dtype=np.float32)
    return np.concatenate([grey.ravel() / 255, (grey < 215).ravel()])


def test_prose_drops_markup_and_keeps_sentences():
    docstring = """Compute the mean, e.g. of `x`. See :func:`~a.b`.

    Parameters
    ----------
    x : array_like
        Numbers whose mean
        is wanted.

    Examples
    --------
    >>> mean([1, 2])
    1.5
    """
    assert paragraphs(docstring) == [
        "Compute the mean, e.g. of x. See a.b.",
        "Parameters:",
        "x : array_like. Numbers whose mean is wanted.",
    ]
    assert first_sentence("Compute the mean, e.g. of x. See a.b.") == ("Compute the mean, e.g. of x.", "See a.b.")
    assert paragraphs("Set %(name)s.") == []
    assert shorten("One sentence here. Another one follows it.", 25) == "One sentence here."


def test_digest_follows_what_the_content_is_made_of(monkeypatch):
    before = builtin.digest()
    monkeypatch.setattr(builtin, "CONTENT_VERSION", builtin.CONTENT_VERSION + 1)
    assert builtin.digest() != before
