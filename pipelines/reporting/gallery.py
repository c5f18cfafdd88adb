"""What does it find? For some queries of every task: the query, its right answer, and what the model puts first."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from cluster import storage
from moca_core.data.image_files import ImageBounds, ImageError, decode
from moca_core.data.schema import rows_to_content
from moca_core.rng import generator
from moca_core.types import Content
from pipelines.pictures.gallery import draw_gallery
from pipelines.reporting.pages import page
from pipelines.runner.step import Context
from pipelines.tables import parquet_file, read_table

FOUND, CHARACTERS, IMAGES = 5, 220, 2
PER_TASK, IN_ALL = 8, 120  # queries that are shown
THUMBNAIL_PX = 300  # screens have twice the pixels that CSS counts
BOUNDS = ImageBounds()


@dataclass(frozen=True)
class Found:
    """One of the model's best answers, as a position in the task's candidates."""

    candidate: int
    similarity: float
    right: bool


@dataclass(frozen=True)
class Shown:
    """A query, its first right answer and what was found, best first. `rank` is that of the right answer, from 1; it has a half
    where answers are equally similar."""

    query: int
    answer: int
    others: int  # right answers besides
    rank: float
    similarity: float
    found: tuple[Found, ...]


def choose(precision_at_1: Sequence[float], count: int, key: tuple[str | int, ...]) -> list[int]:
    """`count` queries, in an order drawn by `key`: of those answered right and of the others the first ones of that order, as many of
    each as makes their share what it is among all."""
    values = np.asarray(precision_at_1)
    order = generator(*key, "gallery").permutation(len(values))
    count = min(count, len(values))
    right = round(count * float(values.mean()))
    good, bad = order[values[order] >= 0.5], order[values[order] < 0.5]
    right = min(max(right, count - len(bad)), len(good))
    taken = {*good[:right].tolist(), *bad[: count - right].tolist()}
    return [int(query) for query in order if query in taken]


def entries(positives: Mapping[int, Sequence[int]], rankings: Sequence[Mapping[str, Any]]) -> list[Shown]:
    """Of the chosen queries: {query: its right answers}, over the rankings of all queries, in their order."""
    shown = []
    for query, right in positives.items():
        row = rankings[query]
        best = list(zip(row["top"], row["similarity"], strict=True))[:FOUND]
        found = tuple(Found(place, similarity, place in right) for place, similarity in best)
        first = next((f.candidate for f in found if f.right), right[0])
        shown.append(Shown(query, first, len(right) - 1, row["right_rank"], row["right_similarity"], found))
    return shown


def gallery(tasks: Mapping[str, str], rankings: Mapping[str, str], count: int = PER_TASK) -> list[dict[str, Any]]:
    """What gallery.html and draw_gallery show: for each task, named with its folder (queries and candidates) and its table of rankings,
    at most `count` queries, fewer where there are many tasks."""
    count = max(2, min(count, IN_ALL // max(1, len(tasks))))
    return [_task(name, tasks[name], rankings[name], count) for name in tasks]


def keep_galleries(context: Context, tasks: Mapping[str, str], rankings: Mapping[str, Mapping[str, str]]) -> None:
    """Writes gallery/MODEL.html, whole in itself, and MODEL.png for every model below the step's folder, and logs them.

    `tasks` {task: folder}, `rankings` {model: {task: path below the step's folder}}.
    """
    for model, by_task in rankings.items():
        found = gallery(tasks, {task: context.path(path) for task, path in by_task.items()})
        title = f"What {model} finds"
        files = {"html": page("gallery.html", title=title, tasks=found), "png": draw_gallery(title, found)}
        for kind, data in files.items():
            context.keep(f"gallery/{model}.{kind}", data)


def _task(name: str, uri: str, rankings_uri: str, count: int) -> dict[str, Any]:
    rankings = read_table(rankings_uri).to_pylist()
    precision = [row["precision_at_1"] for row in rankings]
    queries = rows_at(storage.join(uri, "queries.parquet"), choose(precision, count, (name,)))
    shown = entries({place: row["positives"] for place, row in queries.items()}, rankings)
    wanted = {place for entry in shown for place in (entry.answer, *(f.candidate for f in entry.found))}
    candidates = rows_at(storage.join(uri, "candidates.parquet"), wanted)
    drawn = {place: drawable(rows_to_content(row["content"])) for place, row in candidates.items()}
    return {
        "name": name,
        "queries": len(rankings),
        "precision": float(np.mean(precision)),
        "shown": [
            {
                "query": drawable(rows_to_content(queries[entry.query]["content"])),
                "answer": drawn[entry.answer],
                "others": entry.others,
                "rank": f"{entry.rank:g}",
                "similarity": entry.similarity,
                "first": entry.rank == 1,
                "found": [
                    {"content": drawn[f.candidate], "similarity": f.similarity, "right": f.right} for f in entry.found
                ],
            }
            for entry in shown
        ],
    }


def rows_at(uri: str, places: Collection[int]) -> dict[int, dict]:
    """{place: row} of a table, in the order of `places`. Only row groups that hold one are read."""
    file, rows, first = parquet_file(uri), {}, 0  # studies draw several at a time, in threads
    for group in range(file.metadata.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        here = [place for place in places if first <= place < first + count]
        if here:
            taken = file.read_row_group(group).take([place - first for place in here]).to_pylist()
            rows |= dict(zip(here, taken, strict=True))
        first += count
    return {place: rows[place] for place in places}


def drawable(content: Content) -> dict[str, Any]:
    """A content to look at: its text shortened, its first images small (None: cannot be read), and how many more there are."""
    texts = " ".join(" ".join(s.text.split()) for s in content if s.text is not None)
    images = [s.image for s in content if s.image is not None]
    return {
        "text": texts if len(texts) <= CHARACTERS else f"{texts[:CHARACTERS].rstrip()} …",
        "images": [thumbnail(image) for image in images[:IMAGES]],
        "more": max(0, len(images) - IMAGES),
    }


def thumbnail(image: bytes) -> Image.Image | None:
    """A small copy of an untrusted image; None where it cannot be read within bounds."""
    try:
        picture = decode(image, BOUNDS)
    except ImageError:
        return None
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    return picture
