"""Page tables: pictures of pages with questions about them (ColPali, VDR, Docmatix). Documents, and pairs of question and page.

`image` is bytes, a struct, a path, a data: URI or a list of those; `query` and `answer` are texts or lists of texts; `texts` (Docmatix)
are turns with `user` and `assistant`. As a document: the pages, then all the texts. As pairs: every question with its pages. A row that
asks nothing (in VDR a page that only serves as a negative) gives no pair. `negatives` are taken where they are images
themselves; VDR's are ids of other rows, and are not looked up.
"""

from collections.abc import Callable, Iterator

from moca_core.sources import Location
from moca_core.sources.fields import BadRow, as_image, as_list, as_text, gathered, image_if_there
from moca_core.sources.listing import folder_name, parquet_units
from moca_core.sources.pairing import pair_of, task_name
from moca_core.sources.rows import parquet_rows, read_rows
from moca_core.types import Content, Document, Pair, Rejected, Segment

COLUMNS = {
    "image": ("image", "images", "page_image", "image_path"),
    "query": ("query", "question", "queries", "questions"),
    "answer": ("answer", "answers"),
    "texts": ("texts",),
    "negatives": ("negative_images", "negatives", "negative_image"),
}
OPTIONS = {"columns": tuple(COLUMNS), "images": ()}
OPTIONAL = ("query", "answer", "texts", "negatives")
list_units = parquet_units


def read_unit(location: Location, unit: dict) -> Iterator[Document | Rejected]:
    path = unit["path"]

    def document(row: dict) -> Document:
        said = [text for turn in _turns(row) for text in turn if text]
        texts = (Segment(text="\n\n".join(said)),) if said else ()
        return Document(folder_name(path), _images(row["image"], "image", location, path, image_if_there) + texts)

    return read_rows(parquet_rows(location, unit, COLUMNS, OPTIONAL), document)


def read_pairs(location: Location, unit: dict) -> Iterator[Pair | Rejected]:
    path = unit["path"]
    task = task_name(path)

    def pair(row: dict) -> Pair:
        pages = _images(row["image"], "image", location, path)
        if not pages:
            raise BadRow("image_missing", "no page")
        wrong = [value for value in _listed(row["negatives"]) if not isinstance(value, str)]
        negatives = (_images(value, "negatives", location, path) for value in wrong)
        return pair_of(task, (Segment(text=row["asked"]),), (pages,), negatives)

    return read_rows(_questions(parquet_rows(location, unit, COLUMNS, OPTIONAL)), pair)


def _questions(rows: Iterator[tuple[str, dict | BadRow]]) -> Iterator[tuple[str, dict | BadRow]]:
    """A row for every question of a row, as `asked`."""
    for where, row in rows:
        try:
            if isinstance(row, BadRow):
                raise row
            for number, (question, _) in enumerate(_turns(row)):
                if question:
                    yield f"{where} question {number}", row | {"asked": question}
        except BadRow as error:
            yield where, error


def _turns(row: dict) -> list[tuple[str, str]]:
    """(question, answer) of a row, "" where there is none of the two. Raises BadRow."""
    turns = []
    for turn in as_list(row["texts"], "texts"):
        if not isinstance(turn, dict):
            raise BadRow("malformed_row", f"texts: turns were expected, got {type(turn).__name__}")
        turns.append((as_text(turn.get("user"), "user"), as_text(turn.get("assistant"), "assistant")))
    questions = [as_text(text, "query") for text in _listed(row["query"])]
    answers = [as_text(text, "answer") for text in _listed(row["answer"])]
    if len(questions) == len(answers):
        return turns + list(zip(questions, answers, strict=True))
    return turns + [(question, "") for question in questions] + [("", answer) for answer in answers]


def _listed(value: object) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def _images(value: object, role: str, location: Location, path: str, read: Callable[..., bytes] = as_image) -> Content:
    return gathered(Segment(image=read(image, role, location, path)) for image in _listed(value))
