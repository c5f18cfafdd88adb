"""Validation: what may enter a corpus or a pair set. Bad data gets a reason and is kept aside, never mended in silence."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

from moca_core.data.image_files import ImageBounds, ImageError, decode
from moca_core.data.quality import TextBounds, unwanted
from moca_core.types import Content, Document, EvalTask, Pair, Rejected, Segment

DROPPED = "dropped_"  # before the reason of an image whose document goes on without it


def image_problem(image: bytes, bounds: ImageBounds) -> ImageError | None:
    """Why an image cannot be used, or None: all of it is decoded to find out."""
    if not image:
        return ImageError("image_missing", "no bytes, or no such file")
    try:
        decode(image, bounds)
    except ImageError as error:
        return error
    return None


def problem(content: Content, bounds: ImageBounds) -> ImageError | None:
    """Why this content cannot be used, or None."""
    if is_empty(content):
        return ImageError("empty", "no text and no image")
    images = (segment.image for segment in content if segment.image is not None)
    return next(filter(None, (image_problem(image, bounds) for image in images)), None)


def is_empty(content: Content) -> bool:
    return not any(segment.image is not None or segment.text.strip() for segment in content)


def valid_documents(
    items: Iterable[Document | Rejected],
    bounds: ImageBounds,
    *,
    text_bounds: TextBounds | None = None,
    drop_images: bool = False,
) -> Iterator[Document | Rejected]:
    """The same items, with documents that cannot be used or are not wanted turned into rejections.

    With `drop_images` a document goes on without those of its images that cannot be used, and each of them is a rejection of
    its own, counted as `DROPPED` and its reason.
    """
    for item in items:
        if isinstance(item, Document) and drop_images:
            kept, dropped = without_bad_images(item, bounds)
            yield from dropped
            error = ImageError("empty", "no text and no good image") if is_empty(kept.content) else None
            item = kept
        elif isinstance(item, Document):
            error = problem(item.content, bounds)
        else:
            yield item
            continue
        if error:
            yield Rejected(error.reason, error.detail, item.where)
        elif text_bounds and (rejected := unwanted(item.content, text_bounds, item.where)):
            yield rejected
        else:
            yield item


def without_bad_images(document: Document, bounds: ImageBounds) -> tuple[Document, list[Rejected]]:
    content: list[Segment] = []
    dropped = []
    for place, segment in enumerate(document.content):
        if segment.image is not None and (error := image_problem(segment.image, bounds)):
            dropped.append(Rejected(DROPPED + error.reason, error.detail, f"{document.where} segment {place}"))
        else:
            content.append(segment)
    return replace(document, content=tuple(content)), dropped


def valid_pairs(items: Iterable[Pair | Rejected], bounds: ImageBounds) -> Iterator[Pair | Rejected]:
    for item in items:
        if isinstance(item, Pair):
            sides = (item.query, *item.positives, *item.negatives)
            error = next(filter(None, (problem(side, bounds) for side in sides)), None)
            if error:
                yield Rejected(error.reason, error.detail, item.where)
                continue
        yield item


def check_task(task: EvalTask, bounds: ImageBounds) -> None:
    """Raises ValueError where an evaluation task cannot be trusted: a score over a mended task is no score."""
    if not task.queries:
        raise ValueError(f"task {task.name}: no queries")
    for kind, contents in (("query", [q.content for q in task.queries]), ("candidate", task.candidates)):
        for number, content in enumerate(contents):
            if error := problem(content, bounds):
                raise ValueError(f"task {task.name}, {kind} {number}: {error}")
    for number, query in enumerate(task.queries):
        pool = range(len(task.candidates)) if query.candidates is None else query.candidates
        if not query.positives or not set(query.positives) <= set(pool):
            raise ValueError(
                f"task {task.name}, query {number}: right answers {query.positives} are not among its candidates"
            )
        if len(set(query.positives)) < len(query.positives):
            raise ValueError(
                f"task {task.name}, query {number}: right answers {query.positives} name one more than once"
            )
        if query.grades is not None and (
            len(query.grades) != len(query.positives) or not all(0 < grade < math.inf for grade in query.grades)
        ):
            raise ValueError(
                f"task {task.name}, query {number}: grades {query.grades} of {len(query.positives)} right answers; "
                "each needs one above 0"
            )
