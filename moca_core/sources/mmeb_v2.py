"""MMEB-V2's image and visual-document tasks as published: a folder for every task.

image-tasks/ImageNet-1K/test-*.parquet                     rows with instructions (sources/mmeb_eval.py); `images` says where their
                                                           archive is unpacked
visdoc-tasks/docvqa_test_subsampled_beir/{corpus,queries,qrels}/*.parquet      BEIR folders (sources/beir.py)
"""

import posixpath
import re
from collections.abc import Iterator
from dataclasses import replace

from moca_core.sources import Location, beir, mmeb_eval
from moca_core.sources.beir_files import FILE
from moca_core.sources.listing import find_files, row_group_units
from moca_core.types import EvalTask

OPTIONS = {"images": ()}


def read_tasks(location: Location) -> Iterator[EvalTask]:
    """Tasks of both kinds. Raises ValueError where there is none, and for broken rows."""
    files = [path for path, _ in find_files(location, ".parquet")]
    top = posixpath.dirname(re.split(r"[*?\[]", location.path + "/")[0]) + "/"  # what lies above says nothing of a file
    rows = [path for path in files if not FILE.fullmatch(path.removeprefix(top))]
    yield from mmeb_eval.tasks_of(location, row_group_units(location.fs, rows))
    if len(rows) < len(files):
        yield from beir.read_tasks(replace(location, images=None))
