"""Passages: a long content cut so that all of it can be found, not only what the model reads of its beginning."""

import re
from collections.abc import Iterator

from moca_core.data.render import Renderer
from moca_core.types import Content, Segment

TEXT_TOKENS = 384  # of a passage beside one image: a few paragraphs, which is what one vector can stand for
HEADING = re.compile(r"#{1,6}[ \t]")


def passages(content: Content, renderer: Renderer) -> list[Content]:
    """The content in order, in pieces that begin at the headings of Markdown, and end at a paragraph or an image.

    A piece has at most TEXT_TOKENS and one image of the largest size, or what the model reads, if that is less. A heading stays with what
    follows it; a paragraph that is too long by itself is cut between words.
    """
    budget = min(renderer.max_tokens, renderer.spec.max_image_tokens + 2 + TEXT_TOKENS)
    found: list[Content] = []
    held: list[Segment] = []
    held_tokens = 0
    for segment in _atoms(content, renderer, min(budget, TEXT_TOKENS)):
        tokens = renderer.length(segment) + 2  # and the blank line before it
        begins = _is_heading(segment) and not all(map(_is_heading, held))
        if held and (begins or held_tokens + tokens > budget):
            found.append(_joined(held))
            held, held_tokens = [], 0
        held.append(segment)
        held_tokens += tokens
    return [*found, _joined(held)] if held else found


def _atoms(content: Content, renderer: Renderer, most_tokens: int) -> Iterator[Segment]:
    """Images and paragraphs of at most so many tokens."""
    for segment in content:
        if segment.text is None:
            yield segment
            continue
        for paragraph in filter(str.strip, re.split(r"\n[ \t]*\n", segment.text)):
            yield from _cut(paragraph.strip("\n"), renderer, most_tokens)


def _cut(text: str, renderer: Renderer, most_tokens: int) -> Iterator[Segment]:
    segment = Segment(text=text)
    if renderer.length(segment) <= most_tokens or len(text) < 2:
        yield segment
        return
    middle = len(text) // 2
    space = max(text.rfind(" ", 0, middle), text.rfind("\n", 0, middle))
    place = space if space > 0 else middle
    yield from _cut(text[:place], renderer, most_tokens)
    yield from _cut(text[place:].lstrip() or " ", renderer, most_tokens)


def _is_heading(segment: Segment) -> bool:
    return segment.text is not None and HEADING.match(segment.text) is not None and "\n" not in segment.text


def _joined(segments: list[Segment]) -> Content:
    """Neighbouring paragraphs as one text."""
    joined: list[Segment] = []
    for segment in segments:
        if segment.text is not None and joined and joined[-1].text is not None:
            joined[-1] = Segment(text=f"{joined[-1].text}\n\n{segment.text}")
        else:
            joined.append(segment)
    return tuple(joined)
