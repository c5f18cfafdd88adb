"""Benchmarks as data: the right number of tasks of every kind, found again by the names of published folders, asked as they say."""

from collections import Counter

import pytest
from samples import image, text

from moca_core.benchmarks import PROMPTS, Prompts, known_name, tasks

TASKS = tasks().values()


def test_mmeb_has_36_tasks_of_which_20_are_in_distribution():
    """The numbers of the MMEB paper's table of datasets."""
    mmeb = [task for task in TASKS if task.benchmark == "MMEB"]
    assert Counter(task.meta_task for task in mmeb) == {
        "Classification": 10,
        "VQA": 10,
        "Retrieval": 12,
        "Grounding": 4,
    }
    assert Counter(task.in_distribution for task in mmeb) == {True: 20, False: 16}
    assert {task.metric for task in mmeb} == {"precision_at_1"}


def test_the_average_of_the_papers_own_scores_is_the_papers_average():
    """MoCa-3B's scores by task (arXiv 2506.23115) give its row of table 1 through our grouping, rounding aside."""
    by_task = {
        "ImageNet-1K": 75.4, "N24News": 80.9, "HatefulMemes": 70.6, "VOC2007": 87.0, "SUN397": 74.8, "Place365": 38.8,
        "ImageNet-A": 39.7, "ImageNet-R": 75.4, "ObjectNet": 31.3, "Country211": 24.0, "OK-VQA": 40.0, "A-OKVQA": 54.6,
        "DocVQA": 93.0, "InfographicsVQA": 67.7, "ChartQA": 64.1, "Visual7W": 61.6, "ScienceQA": 45.4, "VizWiz": 52.3,
        "GQA": 66.9, "TextVQA": 83.1, "VisDial": 80.5, "CIRR": 55.7, "VisualNews_t2i": 74.4, "VisualNews_i2t": 77.8,
        "MSCOCO_t2i": 76.4, "MSCOCO_i2t": 72.6, "NIGHTS": 67.4, "WebQA": 90.6, "FashionIQ": 22.2, "Wiki-SS-NQ": 73.3,
        "OVEN": 75.9, "EDIS": 80.8, "MSCOCO": 80.2, "RefCOCO": 92.1, "RefCOCO-Matching": 92.8, "Visual7W-Pointing": 89.5,
    }  # fmt: skip
    mmeb = {task.name: task for task in TASKS if task.benchmark == "MMEB"}
    assert set(by_task) == set(mmeb)

    def mean(wanted):
        return sum(s for n, s in by_task.items() if wanted(mmeb[n])) / sum(wanted(task) for task in mmeb.values())

    table_1 = {"Classification": 59.8, "VQA": 62.9, "Retrieval": 70.6, "Grounding": 88.6}
    for meta_task, score in table_1.items():
        assert mean(lambda task, m=meta_task: task.meta_task == m) == pytest.approx(score, abs=0.06)
    assert mean(lambda task: task.in_distribution) == pytest.approx(72.3, abs=0.06)
    assert mean(lambda task: not task.in_distribution) == pytest.approx(61.5, abs=0.06)
    assert mean(lambda task: True) == pytest.approx(67.5, abs=0.06)


def test_mmeb_v2_has_24_tasks_of_visual_documents():
    documents = [task for task in TASKS if task.benchmark == "MMEB-V2 visdoc"]
    assert Counter(task.meta_task for task in documents) == {
        "ViDoRe v1": 10,
        "ViDoRe v2": 4,
        "VisRAG": 6,
        "VisDoc OOD": 4,
    }
    assert {task.metric for task in documents} == {"ndcg_at_5"}


def test_prompts_that_tasks_name_are_there():
    assert {task.prompts for task in TASKS} <= set(PROMPTS)
    assert PROMPTS["moca"].image == "\nRepresent the given document image."


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("MSCOCO_t2i/test", "MSCOCO_t2i"),
        ("MSCOCO/test", "MSCOCO"),
        ("MMEB-eval/ImageNet_1K", "ImageNet-1K"),
        ("docvqa_test_subsampled_beir", "ViDoRe_docvqa"),
        ("VisRAG-Ret-Test-MP-DocVQA", "VisRAG_MP-DocVQA"),
        ("esg_reports_v2", "ViDoRe_esg_reports_v2_multilingual"),
        ("kicad/mmeb_eval", None),
        ("my/DocVQA_of_mine", None),
    ],
)
def test_folders_are_known_by_their_published_names(path, name):
    assert known_name(path) == name


def test_no_two_tasks_have_a_name_in_common():
    for task in TASKS:
        assert {known_name(name) for name in (task.name, *task.aliases)} == {task.name}


def test_where_prompts_stand():
    page, prompts = image(56, 56), Prompts(query="Find: ", image="\nRead it.")
    assert prompts.put((text("a lamp"),), query=True) == (text("Find: a lamp"),)
    assert prompts.put((page, text("a lamp")), query=True) == (page, text("Find: a lamp"))
    assert prompts.put((page,), query=True) == (page,)
    assert prompts.put((page,), query=False) == (page, text("\nRead it."))
    for content in ((text("a lamp"),), (page, text("a caption"))):
        assert prompts.put(content, query=False) == content
        assert Prompts().put(content, query=True) == Prompts().put(content, query=False) == content
