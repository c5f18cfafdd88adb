"""Validation: what may enter a corpus or a pair set. Bad data gets a reason and is kept aside, never mended in silence."""

from collections.abc import Iterable, Iterator

from moca_core.data.images import ImageBounds, ImageError, decode
from moca_core.types import Content, Document, EvalTask, Pair, Rejected


def problem(content: Content, bounds: ImageBounds) -> ImageError | None:
    """Why this content cannot be used, or None."""
    if not any(segment.image or (segment.text and segment.text.strip()) for segment in content):
        return ImageError("empty", "no text and no image")
    for segment in content:
        if segment.image is not None:
            try:
                decode(segment.image, bounds)
            except ImageError as error:
                return error
    return None


def valid_documents(items: Iterable[Document | Rejected], bounds: ImageBounds) -> Iterator[Document | Rejected]:
    """The same items, with documents that cannot be used turned into rejections."""
    for item in items:
        if isinstance(item, Document) and (error := problem(item.content, bounds)):
            yield Rejected(error.reason, error.detail, f"{item.source} {item.doc_id}")
        else:
            yield item


def valid_pairs(items: Iterable[Pair | Rejected], bounds: ImageBounds) -> Iterator[Pair | Rejected]:
    for item in items:
        if isinstance(item, Pair):
            sides = (item.query, *item.positives, *item.negatives)
            error = next(filter(None, (problem(side, bounds) for side in sides)), None)
            if error:
                yield Rejected(error.reason, error.detail, f"{item.source} pair")
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
