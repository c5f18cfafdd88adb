"""Pictures show what they are given."""

import io

import numpy as np
import pytest
from PIL import Image

from pipelines.pictures.counts import count_bars
from pipelines.pictures.figure import BLUE, ORANGE
from pipelines.pictures.similarities import similarity_histograms

BINS = 100


def counts_around(similarity: float, number: int) -> list[float]:
    spread = similarity + 0.05 * np.random.default_rng(number).normal(size=number)
    return np.histogram(spread.clip(-1, 1), BINS, (-1, 1))[0].tolist()


def colours(png: bytes) -> tuple[tuple[int, int], np.ndarray, np.ndarray]:
    """Size, and x of the pixels that are rather blue (right answers) and rather orange (negatives)."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    red, _, blue = np.moveaxis(np.asarray(image).astype(int), 2, 0)
    return image.size, np.nonzero(blue > red + 60)[1], np.nonzero(red > blue + 60)[1]


def test_right_answers_stand_right_of_negatives_and_either_is_seen() -> None:
    png = similarity_histograms({"a": (counts_around(0.6, 10), counts_around(0.1, 3000))})
    (width, _), right, wrong = colours(png)
    assert min(len(right), len(wrong)) > 500 and np.median(right) - np.median(wrong) > 0.3 * width
    _, right, wrong = colours(similarity_histograms({"a": (counts_around(0.1, 10), counts_around(0.6, 3000))}))
    assert np.median(right) < np.median(wrong)


def test_every_task_has_a_panel() -> None:
    kinds = counts_around(0.6, 10), counts_around(0.1, 3000)
    sizes = [colours(similarity_histograms({f"task {n}": kinds for n in range(many)}))[0] for many in (1, 4, 5)]
    assert sizes[0][0] < sizes[1][0] == sizes[2][0] and sizes[0][1] == sizes[1][1] < sizes[2][1]


def test_nothing_seen_is_an_empty_panel() -> None:
    similarity_histograms({"a": ([0.0] * BINS, [0.0] * BINS)})


def test_what_was_lost_is_drawn_beside_what_was_kept() -> None:
    kept, lost = areas({"used": 300}, {"empty": 100, "too_short": 50})
    assert lost == pytest.approx(kept / 2, rel=0.1)
    assert areas({"used": 300}, {})[1] == 0 and areas({}, {}) == (0, 0)


def areas(counts: dict[str, int], lost: dict[str, int]) -> tuple[int, int]:
    """Pixels of either kind of bars."""
    pixels = np.asarray(Image.open(io.BytesIO(count_bars("a title", counts, lost))).convert("RGB"))
    return tuple(int((pixels == [int(c[i : i + 2], 16) for i in (1, 3, 5)]).all(axis=2).sum()) for c in (BLUE, ORANGE))
