"""MMEB: 36 tasks of images and texts (arXiv 2410.05160), the image part of MMEB-V2 too (arXiv 2507.04590). Precision@1.

A query chooses among candidates of its own. In distribution are the 20 tasks whose training sets are part of MMEB-train. Prompts stand
in the rows.
"""

from moca_core.benchmarks import BenchmarkTask

_IN = {
    "Classification": "ImageNet-1K N24News HatefulMemes VOC2007 SUN397",
    "VQA": "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W",
    "Retrieval": "VisDial CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS WebQA",
    "Grounding": "MSCOCO",
}
_OUT = {
    "Classification": "Place365 ImageNet-A ImageNet-R ObjectNet Country211",
    "VQA": "ScienceQA VizWiz GQA TextVQA",
    "Retrieval": "FashionIQ Wiki-SS-NQ OVEN EDIS",
    "Grounding": "RefCOCO RefCOCO-Matching Visual7W-Pointing",
}

TASKS = tuple(
    BenchmarkTask(name, "MMEB", meta_task, "precision_at_1", in_distribution)
    for meta_task in _IN
    for names, in_distribution in ((_IN, True), (_OUT, False))
    for name in names[meta_task].split()
)
