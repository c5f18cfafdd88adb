"""BEIR folders: corpus, queries and judgments (qrels) in files of their own, for training pairs and for evaluation tasks.

    scifact/corpus.jsonl  scifact/queries.jsonl  scifact/qrels/train.tsv      as BEIR has them, also .gz and .zst
    esg/corpus/test-*.parquet  esg/queries/...   esg/qrels/...                as ViDoRe v2 and v3 have them, pages as images

Every folder with such files is a dataset. Answers with a score above 0 are right ones, the others are known to be wrong. To
evaluate, the score is how right an answer is.
Training takes the judgments of "train": the queries are cut into units, each of which passes once over the corpus and keeps
the rows that its judgments name, so memory is bounded by `beir_files.HELD_BYTES` and not by the corpus. An evaluation task
takes the judgments of "test", or else of "dev"; all of the corpus are its candidates and stand in memory. A folder that is called
after a task of a public benchmark is that task, and some of those have nothing but a split "train".
"""

from collections.abc import Callable, Collection, Iterator

from moca_core.benchmarks import known_name
from moca_core.sources import Location
from moca_core.sources.beir_files import Dataset, as_id, count_parts, datasets, judgments, share_of
from moca_core.sources.fields import BadRow, as_image, as_text
from moca_core.sources.pairing import Columns, blank, file_rows, pair_of
from moca_core.sources.rows import read_rows
from moca_core.sources.triplets import titled
from moca_core.types import Content, EvalTask, Pair, Query, Rejected, Segment, content_id

IMAGES = ("image", "image_path", "img_path")
CORPUS = {"id": ("_id", "corpus-id", "corpus_id", "id"), "title": ("title",), "text": ("text",), "image": IMAGES}
QUERIES = {"id": ("_id", "query-id", "query_id", "id"), "query": ("text", "query"), "query_image": IMAGES}
OPTIONAL = ("title", "text", "image", "query", "query_image")
OPTIONS = {"columns": OPTIONAL, "images": ()}
TASK_SPLITS = ("test", "dev", "validation")

Kept = dict[str, tuple[str, dict]]  # by id: the file and the row


def list_units(location: Location) -> list[dict]:
    """Shares of the training queries of every dataset. Raises ValueError where no dataset has any."""
    units: list[dict] = []
    for dataset in datasets(location):
        if qrels := dataset.qrels("train"):
            corpus, queries = dataset.rows_for("corpus", "train"), dataset.rows_for("queries", "train")
            files = {"corpus": corpus, "queries": queries, "qrels": qrels}
            paths = {part: [file.path for file in listed] for part, listed in files.items()}
            parts = count_parts(location, corpus, qrels)
            units += [{"name": f"{dataset.name}/train", "part": i, "parts": parts, **paths} for i in range(parts)]
    if not units:
        raise ValueError(f"{location.path}: no qrels/train there to make training pairs of")
    return units


def read_pairs(location: Location, unit: dict) -> Iterator[Pair | Rejected]:
    """The pairs of one share of the queries. What is broken in the files is told by the first, which reads them to their end."""
    asked: dict[str, dict[str, float]] = {}
    queries: Kept = {}
    answers: Kept = {}

    def pair(row: dict) -> Pair:
        query = _query(location, *_named(queries, row["id"], "query"))
        judged = asked[row["id"]].items()

        def answered(well: bool) -> Iterator[Content]:
            return (_document(location, *_named(answers, name, "answer")) for name, s in judged if (s > 0) == well)

        return pair_of(unit["name"], query, answered(True), answered(False))

    broken = _read_share(location, unit, asked, queries, answers)
    yield from read_rows((row for row in broken if unit["part"] == 0), pair)
    yield from read_rows(((f"{unit['qrels'][0]} query {name}", {"id": name}) for name in asked), pair)


def _read_share(
    location: Location, unit: dict, asked: dict[str, dict[str, float]], queries: Kept, answers: Kept
) -> Iterator[tuple[str, BadRow]]:
    """Fills in the judgments of the share, its queries and their answers; yields what is broken on the way."""
    for path in unit["qrels"]:
        for where, judgment in judgments(location, path):
            if isinstance(judgment, BadRow):
                yield where, judgment
            elif share_of(judgment[0], unit["parts"]) == unit["part"]:
                asked.setdefault(judgment[0], {})[judgment[1]] = judgment[2]
    named = {document for judged in asked.values() for document in judged}
    whole = unit["part"] == 0
    yield from _keep(location, unit["queries"], QUERIES, asked, whole, queries)
    yield from _keep(location, unit["corpus"], CORPUS, named, whole, answers)


def _keep(
    location: Location, files: list[str], columns: Columns, wanted: Collection[str], whole: bool, kept: Kept
) -> Iterator[tuple[str, BadRow]]:
    """Keeps the rows with a wanted id, of equal ids the first; yields rows that have none. Ends when none is missing, unless it
    is to read on for those."""
    for path in files:
        for where, row in file_rows(location, path, columns, OPTIONAL):
            if len(kept) == len(wanted) and not whole:
                return
            try:
                name = _id(row)
            except BadRow as error:
                yield where, error
                continue
            if name in wanted:
                kept.setdefault(name, (path, row))


def _id(row: dict | BadRow) -> str:
    if isinstance(row, BadRow):
        raise row
    return as_id(row["id"], "id")


def _named(kept: Kept, name: str, role: str) -> tuple[str, dict]:
    if name not in kept:
        raise BadRow(f"{role}_missing", f"the judgments name {role} {name}, which is in none of the files")
    return kept[name]


def _document(location: Location, path: str, row: dict) -> Content:
    image = as_image(row["image"], "image", location, path)
    return _content(image, titled(row["title"], row["text"], "text"))


def _query(location: Location, path: str, row: dict) -> Content:
    image = as_image(row["query_image"], "query image", location, path)
    return _content(image, as_text(row["query"], "query"))


def _content(image: bytes, text: str) -> Content:
    parts = ([Segment(image=image)] if image else []) + ([Segment(text=text)] if text else [])
    return tuple(parts) or (Segment(text=""),)


def read_tasks(location: Location) -> Iterator[EvalTask]:
    """One task for every dataset with a test or dev split. Raises ValueError where there is none, and for broken rows."""
    tasks = []
    for dataset in datasets(location):
        known = known_name(dataset.name.rsplit("/", 1)[-1])
        splits = (*TASK_SPLITS, "train") if known else TASK_SPLITS
        if split := next((split for split in splits if dataset.qrels(split)), None):
            tasks.append((dataset, split, known or f"{dataset.name}/{split}"))
    if not tasks:
        raise ValueError(f"{location.path}: no qrels/test or qrels/dev there to evaluate with")
    for dataset, split, name in tasks:
        yield _task(location, dataset, split, name)


def _task(location: Location, dataset: Dataset, split: str, name: str) -> EvalTask:
    """Queries without a right answer are left out, as no ranking of theirs is right; so are empty documents."""
    right: dict[str, dict[str, float]] = {}
    for file in dataset.qrels(split):
        for where, judgment in judgments(location, file.path):
            if isinstance(judgment, BadRow):
                raise ValueError(f"{where}: {judgment}")
            query, answer, score = judgment
            if score > 0:
                right.setdefault(query, {})[answer] = score
    places, candidates = _candidates(location, [file.path for file in dataset.rows_for("corpus", split)])
    asked: dict[str, Content] = {}
    for file in dataset.rows_for("queries", split):
        for where, row in file_rows(location, file.path, QUERIES, OPTIONAL):
            query, content = _sound(location, file.path, where, row, _query)
            if query in right:
                asked.setdefault(query, content)
    for query, answers in right.items():
        if missing := [answer for answer in answers if answer not in places]:
            raise ValueError(
                f"task {name}, query {query}: its answer {missing[0]} is not in the corpus, or empty there"
            )
        if query not in asked:
            raise ValueError(f"task {name}: the judgments name query {query}, which is in none of the files")
        itself = places.get(query)
        wrong = itself is not None and itself not in {places[answer] for answer in answers}
        if wrong and _repeats(candidates[itself], asked[query]):
            raise ValueError(
                f"task {name}, query {query}: the document of that id is the query itself and no right answer, yet it would be found "
                "first; take the task as mteb:NAME (mteb:ArguAna, mteb:QuoraRetrieval), or name candidates in the layout jsonl"
            )
    queries = tuple(_judged(asked[query], answers, places) for query, answers in right.items())
    return EvalTask(name, queries, tuple(candidates))


def _repeats(document: Content, query: Content) -> bool:
    """Whether a document says what the query says, below a title of its own or not."""
    *images, last = query
    *others, end = document
    titled_so = bool(end.text and last.text) and end.text.endswith(f"\n\n{last.text}")
    return images == others and (end == last or titled_so)


def _judged(content: Content, answers: dict[str, float], places: dict[str, int]) -> Query:
    """Ids of one and the same content are one right answer, as right as the best of them."""
    grades: dict[int, float] = {}
    for answer, score in answers.items():
        grades[places[answer]] = max(score, grades.get(places[answer], 0))
    positives = tuple(sorted(grades))
    graded = tuple(grades[place] for place in positives)
    return Query(content, positives, grades=None if set(graded) == {1} else graded)


def _candidates(location: Location, files: list[str]) -> tuple[dict[str, int], list[Content]]:
    """The documents that are not empty, each content once, and where each id stands among them."""
    places: dict[str, int] = {}
    contents: dict[str, int] = {}
    candidates: list[Content] = []
    for path in files:
        for where, row in file_rows(location, path, CORPUS, OPTIONAL):
            name, document = _sound(location, path, where, row, _document)
            if blank(document) or name in places:
                continue
            places[name] = contents.setdefault(content_id(document), len(candidates))
            if places[name] == len(candidates):
                candidates.append(document)
    return places, candidates


def _sound(
    location: Location,
    path: str,
    where: str,
    row: dict | BadRow,
    convert: Callable[[Location, str, dict], Content],
) -> tuple[str, Content]:
    """Id and content of a row. Raises ValueError for a broken one: a score over a mended task is no score."""
    try:
        return _id(row), convert(location, path, row)
    except BadRow as error:
        raise ValueError(f"{where}: {error}") from None
