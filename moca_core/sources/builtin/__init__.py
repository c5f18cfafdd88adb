"""The built-in corpus and pairs: real multimodal data, offline, from what the installation already holds.

    documents.py  document adapter: list_units, read_unit
    pairs.py      pair adapter: list_units, read_pairs, read_tasks
    docs.py       documentation of installed packages, parsed and never imported; prose.py cleans it
    pages.py      a documentation entry as the picture of a page, 224 x 280 px
    plots.py      what is drawn of scikit-learn's tables and how it is described, 112 x 112 px;
                  tables.py holds the data, drawing.py the kinds of plots, canvas.py the figure
    digits.py     handwritten digits, 56 x 56 px
    split.py      what is held out, and seeds: functions of names

Same installation, same bytes: `digest()` says which installation.
"""

import hashlib
from importlib.metadata import PackageNotFoundError, version

CONTENT_VERSION = 2
"""Raise this when a change of the code in this package changes what comes out."""


def digest() -> str:
    """Identifies the built-in content, 16 hex digits: CONTENT_VERSION and the versions of what it is made of."""
    from moca_core.sources.builtin.docs import PACKAGES

    # The documented packages hold matplotlib and scikit-learn already; Pillow draws the pages and encodes every image.
    lines = [f"content {CONTENT_VERSION}"]
    for distribution in sorted({*PACKAGES.values(), "pillow"}):
        try:
            lines.append(f"{distribution} {version(distribution)}")
        except PackageNotFoundError as error:
            raise ValueError(f"the built-in corpus is made of {distribution}, which is not installed") from error
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
