"""Visual documents: a question, and pages as images. ViDoRe v1 (arXiv 2407.01449), v2 (2505.17166) and v3 (2601.08620), and with VisRAG
(2410.10594), ViDoSeek and MMLongBench the 24 tasks of MMEB-V2's part of that kind (2507.04590), which asks nDCG@5 of all of them.

Names are those of MMEB-V2 where it has the task, aliases the folders as published. Of ViDoRe v2 MMEB-V2 counts the sets of all languages,
and those in English beside them are here for the table of the MoCa paper. Every page of a task is a candidate.
"""

from moca_core.benchmarks import BenchmarkTask


def _tasks(benchmark: str, meta_task: str, folders: dict[str, str], metric: str = "ndcg_at_5") -> list[BenchmarkTask]:
    """folders: {name: its published folder}."""
    return [
        BenchmarkTask(name, benchmark, meta_task, metric, prompts="moca", aliases=(folder,) if folder else ())
        for name, folder in folders.items()
    ]


_SYNTHETIC = ("artificial_intelligence", "energy", "government_reports", "healthcare_industry")
_V1 = {
    "ViDoRe_arxivqa": "arxivqa_test_subsampled_beir",
    "ViDoRe_docvqa": "docvqa_test_subsampled_beir",
    "ViDoRe_infovqa": "infovqa_test_subsampled_beir",
    "ViDoRe_tabfquad": "tabfquad_test_subsampled_beir",
    "ViDoRe_tatdqa": "tatdqa_test_beir",
    "ViDoRe_shiftproject": "shiftproject_test_beir",
    **{f"ViDoRe_syntheticDocQA_{name}": f"syntheticDocQA_{name}_test_beir" for name in _SYNTHETIC},
}
_V2 = {
    "ViDoRe_esg_reports_human_labeled_v2": "esg_reports_human_labeled_v2",
    "ViDoRe_biomedical_lectures_v2_multilingual": "biomedical_lectures_v2",
    "ViDoRe_economics_reports_v2_multilingual": "economics_reports_v2",
    "ViDoRe_esg_reports_v2_multilingual": "esg_reports_v2",
}
_V2_ENGLISH = {f"ViDoRe_{name}_v2": "" for name in ("biomedical_lectures", "economics_reports", "esg_reports")}
_VISRAG = {
    f"VisRAG_{name}": f"VisRAG-Ret-Test-{name}"
    for name in ("ArxivQA", "ChartQA", "MP-DocVQA", "SlideVQA", "InfoVQA", "PlotQA")
}
_LONG = {
    "ViDoSeek-page": "ViDoSeek-page-fixed",
    "ViDoSeek-doc": "ViDoSeek",
    "MMLongBench-page": "MMLongBench-page-fixed",
    "MMLongBench-doc": "",
}
_V3 = ["computer_science", "energy", "finance_en", "finance_fr", "hr", "industrial", "pharmaceuticals", "physics"]

TASKS = (
    *_tasks("MMEB-V2 visdoc", "ViDoRe v1", _V1),
    *_tasks("MMEB-V2 visdoc", "ViDoRe v2", _V2),
    *_tasks("MMEB-V2 visdoc", "VisRAG", _VISRAG),
    *_tasks("MMEB-V2 visdoc", "VisDoc OOD", _LONG),
    *_tasks("ViDoRe v2, English", "ViDoRe v2", _V2_ENGLISH),
    *_tasks("ViDoRe v3", "ViDoRe v3", {f"vidore_v3_{name}": "" for name in _V3}, "ndcg_at_10"),
)
