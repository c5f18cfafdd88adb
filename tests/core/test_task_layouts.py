"""Tasks in the layouts of MMEB-V2 and of one's own: what the published code would ask of the same rows, and what is refused."""

import json

import pytest
from layout_files import at, lines, parquet
from samples import png, text

from moca_core.benchmarks import tasks as known_tasks
from moca_core.data.image_files import ImageBounds
from moca_core.data.validate import check_task
from moca_core.sources import mmeb_eval, mmeb_v2, tasks_jsonl
from moca_core.types import Query, Segment

A, B = png(60, 60, 1), png(80, 60, 2)
IMAGE_A, IMAGE_B = Segment(image=A), Segment(image=B)
MARK = "<|image_1|>"


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(A)
    (tmp_path / "images" / "b.png").write_bytes(B)
    return str(tmp_path / "images")


V2 = {
    "ImageNet-1K": {
        "qry_inst": f"{MARK}\nRepresent the given image for classification",
        "qry_text": "",
        "qry_img_path": "a.png",
        "tgt_text": ["a dog", "a cat"],
    },
    "ChartQA": {
        "qry_inst": f"{MARK} Represent the given image with the following question: ",
        "qry_text": "How many?",
        "qry_img_path": "a.png",
        "tgt_text": ["two", "three"],
    },
    "VisDial": {
        "qry_inst": "Represent the given dialogue about an image: ",
        "qry_text": "Q: what? A: that.",
        "tgt_inst": f"{MARK}\nRepresent the given image.",
        "tgt_text": ["", ""],
        "tgt_img_path": ["a.png", "b.png"],
    },
    "EDIS": {
        "qry_inst": "Find a news image: ",
        "qry_text": "a storm",
        "tgt_inst": f"{MARK} Represent the given image with its caption:",
        "tgt_text": ["rain", "sun"],
        "tgt_img_path": ["a.png", "b.png"],
    },
    "NIGHTS": {
        "qry_inst": f"{MARK}\nFind a similar image.",
        "qry_text": "",
        "qry_img_path": "a.png",
        "tgt_inst": f"{MARK}\nRepresent the given image.",
        "tgt_text": ["", ""],
        "tgt_img_path": ["b.png", "a.png"],
    },
}


def test_rows_with_instructions_become_what_version_1_says(tmp_path, images):
    for name, row in V2.items():
        parquet(tmp_path / "tasks" / name / "test-00000-of-00001.parquet", [row])
    found = {task.name: task for task in mmeb_v2.read_tasks(at(tmp_path / "tasks", images=images))}
    assert set(found) == set(V2) <= set(known_tasks())
    asked = {name: task.queries[0].content for name, task in found.items()}
    assert asked == {
        "ImageNet-1K": (IMAGE_A, text("Represent the given image for classification\n")),
        "ChartQA": (IMAGE_A, text("Represent the given image with the following question: How many?\n")),
        "VisDial": (text("Represent the given dialogue about an image: Q: what? A: that.\n\n"),),
        "EDIS": (text("Find a news image: a storm\n"),),
        "NIGHTS": (IMAGE_A, text("Find a similar image.\n")),
    }
    first = {name: task.candidates[task.queries[0].positives[0]] for name, task in found.items()}
    assert first == {
        "ImageNet-1K": (text("a dog"),),
        "ChartQA": (text("two"),),
        "VisDial": (IMAGE_A, text("Represent the given image.\n")),
        "EDIS": (IMAGE_A, text("Represent the given image with its caption: rain\n")),
        "NIGHTS": (IMAGE_B, text("Represent the given image.")),
    }


def test_version_1_says_the_same_in_one_text(tmp_path, images):
    row = {
        "qry_text": f"{MARK}\nRepresent the given image for classification\n",
        "qry_img_path": "a.png",
        "tgt_text": ["a dog", "a cat"],
        "tgt_img_path": ["", ""],
    }
    parquet(tmp_path / "v1" / "ImageNet-1K" / "test.parquet", [row])
    parquet(tmp_path / "v2" / "ImageNet-1K" / "test.parquet", [V2["ImageNet-1K"]])
    (first,) = mmeb_eval.read_tasks(at(tmp_path / "v1", images=images))
    (second,) = mmeb_eval.read_tasks(at(tmp_path / "v2", images=images))
    assert first == second


def test_a_benchmark_task_is_one_task_whatever_its_rows_go_from_and_to(tmp_path, images):
    rows = [
        {"qry_text": "a", "qry_img_path": "", "tgt_text": ["x", "y"], "tgt_img_path": ["", ""]},
        {"qry_text": f"{MARK}\nb", "qry_img_path": "a.png", "tgt_text": ["y", "x"], "tgt_img_path": ["", ""]},
    ]
    parquet(tmp_path / "tasks" / "WebQA.parquet", rows)
    parquet(tmp_path / "tasks" / "mine.parquet", rows)
    found = {task.name: len(task.queries) for task in mmeb_eval.read_tasks(at(tmp_path / "tasks", images=images))}
    assert found == {"WebQA": 2, "tasks/mine/text-to-text": 1, "tasks/mine/image-to-text": 1}


@pytest.mark.parametrize("top", ["corpus", "queries/V2", "qrels/corpus"])
@pytest.mark.parametrize("path", ["", "**/*.parquet", "[iv]*/**/*.parquet"])
def test_what_a_folder_above_is_called_says_nothing(tmp_path, images, top, path):
    write_both(tmp_path / top)
    names = [task.name for task in mmeb_v2.read_tasks(at(tmp_path / top / path, images=images))]
    assert names == ["NIGHTS", "VisRAG_ChartQA"]


def write_both(top):
    """A task of each kind, in the folders that MMEB-V2 has them in."""
    folder = top / "visdoc-tasks" / "VisRAG-Ret-Test-ChartQA"
    page = {"corpus-id": "p1", "image": {"bytes": A, "path": None}}
    parquet(folder / "corpus" / "train-00000-of-00001.parquet", [page])
    parquet(folder / "queries" / "train-00000-of-00001.parquet", [{"query-id": "q1", "query": "where?"}])
    parquet(folder / "qrels" / "train-00000-of-00001.parquet", [{"query-id": "q1", "corpus-id": "p1", "score": 1}])
    parquet(top / "image-tasks" / "NIGHTS" / "test.parquet", [V2["NIGHTS"]])


def test_visual_documents_are_beir_folders_known_by_their_published_names(tmp_path, images):
    write_both(tmp_path)
    nights, chart = mmeb_v2.read_tasks(at(tmp_path, images=images))
    assert (nights.name, chart.name) == ("NIGHTS", "VisRAG_ChartQA")
    assert chart.queries == (Query((text("where?"),), (0,)),) and chart.candidates == ((IMAGE_A,),)


CANDIDATES = [
    {"id": "front", "content": {"image": "images/a.png"}},
    {"id": 7, "content": [{"text": "seen from"}, {"image": "images/b.png"}]},
    {"id": "words", "content": "a lamp"},
]
QUERIES = [
    {"query": "two relays", "answers": ["front"]},
    {
        "query": {"image": "images/a.png", "text": "turned"},
        "answers": {"words": 1, "7": 2.5},
        "candidates": ["7", "words"],
    },
]


def test_one_s_own_set(tmp_path, images):
    for folder in ("boards", "more/lamps"):
        lines(tmp_path / folder / "candidates.jsonl", CANDIDATES)
        lines(tmp_path / folder / "queries.jsonl", QUERIES)
    lines(tmp_path / "half" / "queries.jsonl", QUERIES)
    first, second = tasks_jsonl.read_tasks(at(tmp_path, images=str(tmp_path)))
    assert (first.name, second.name) == ("boards", "lamps")
    assert first.candidates == ((IMAGE_A,), (text("seen from"), IMAGE_B), (text("a lamp"),)) == second.candidates
    assert first.queries == (
        Query((text("two relays"),), (0,)),
        Query((IMAGE_A, text("turned")), (2, 1), (1, 2), (1.0, 2.5)),
    )
    check_task(first, ImageBounds())


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("queries", {"query": "q", "answers": ["none"]}, "no candidate is called 'none'"),
        ("queries", {"query": "q", "answers": []}, "a query without a right answer"),
        ("queries", {"query": "q", "answers": ["front", "front"]}, "answers: 'front' is named 2 times"),
        (
            "queries",
            {"query": "q", "answers": ["front"], "candidates": ["front", 7, "words", "7"]},
            "candidates: 7 is named 2 times",
        ),
        ("queries", {"query": "q", "answers": {"front": 0}}, "a number above 0, got 0"),
        ("queries", {"query": "q", "answers": {"front": True}}, "a number above 0, got True"),
        ("queries", {"query": "q", "answer": ["front"]}, "line: 'answer'; there are query, answers, candidates"),
        ("queries", {"answers": ["front"]}, "query: a text, an object or a list"),
        ("queries", b'{"query": "cut', "line|JSON"),
        ("candidates", {"id": "front", "content": "again"}, "a second candidate is called 'front'"),
        ("candidates", {"content": "x"}, "id: an id was expected"),
        ("candidates", {"id": "x", "content": {"image": "nowhere.png"}}, "no file nowhere.png"),
        ("candidates", {"id": "x", "content": {"image": "../secret.png"}}, "outside of the source"),
    ],
)
def test_a_broken_line_of_one_s_own_set_is_an_error_that_says_where(tmp_path, images, file, line, message):
    rows = {"candidates": list(CANDIDATES), "queries": list(QUERIES)}
    rows[file].append(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n")
    for name, given in rows.items():
        lines(tmp_path / "set" / f"{name}.jsonl", given)
    with pytest.raises(ValueError, match=rf"{file}.jsonl.*({message})"):
        list(tasks_jsonl.read_tasks(at(tmp_path / "set", images=str(tmp_path))))


def test_where_there_is_no_set_of_one_s_own(tmp_path):
    lines(tmp_path / "half" / "queries.jsonl", QUERIES)
    with pytest.raises(ValueError, match=r"no folder with queries.jsonl and candidates.jsonl there"):
        list(tasks_jsonl.read_tasks(at(tmp_path)))
