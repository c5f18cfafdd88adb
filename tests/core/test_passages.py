"""Passages: nothing is lost, each fits what the model reads, and they begin where a reader would begin."""

import re

import pytest
from samples import image, text, words

from moca_core.data.passages import TEXT_TOKENS, passages
from moca_core.data.render import Renderer


@pytest.fixture(scope="module")
def long_reader(tokenizer, spec):
    return Renderer(tokenizer, spec, 600)


def test_sections_of_markdown_are_passages_of_their_own(long_reader):
    first, second = f"# One\n\n{words(20, 1)}", f"## Two\n\n### Deeper\n\n{words(20, 2)}\n\n{words(20, 3)}"
    picture = image(100, 80, 1)
    found = passages((text(f"{first}\n\n{second}"), picture, text("below it")), long_reader)
    assert found == [(text(first),), (text(second), picture, text("below it"))]


@pytest.mark.parametrize("budget", [60, 120, 600])
def test_whatever_is_long_is_cut_to_fit_and_nothing_is_lost(tokenizer, spec, budget):
    renderer = Renderer(tokenizer, spec, max(budget, spec.max_image_tokens + 2))
    content = (
        text(words(900, 1)),
        image(196, 196, 1),
        text(f"{words(30, 2)}\n\n{words(200, 3)}\n\n\n{'x' * 3000}"),
        image(100, 80, 2),
    )
    found = passages(content, renderer)
    assert len(found) > 5 and all(len(renderer.pieces(passage)) == 1 for passage in found)
    assert all(len(renderer.first(p)) <= spec.max_image_tokens + 2 + TEXT_TOKENS for p in found)

    def squeezed(segments):
        return re.sub(r"\s", "", "".join(s.text if s.image is None else "\0" for s in segments))

    assert squeezed(s for passage in found for s in passage) == squeezed(content)
    assert [s.image for p in found for s in p if s.image] == [s.image for s in content if s.image]


def test_nothing_gives_nothing(long_reader):
    assert passages((text(" \n\n \n"),), long_reader) == []
