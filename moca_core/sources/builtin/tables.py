"""The five real tables that scikit-learn brings with it, with names that read well in a sentence. No downloads."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from sklearn import datasets

TABLES = ("iris", "wine", "breast_cancer", "diabetes", "linnerud")


@dataclass(frozen=True, eq=False)
class Table:
    """`values` [rows, columns]; `labels` [rows] are positions in `classes` (all zero where there is only one)."""

    title: str
    rows_are: str  # what one row is, in the plural
    columns: tuple[str, ...]
    values: np.ndarray
    labels: np.ndarray
    class_word: str
    classes: tuple[str, ...]

    def column(self, name: str) -> int:
        return self.columns.index(name)


@lru_cache(maxsize=len(TABLES))
def table(key: str) -> Table:
    """One of TABLES."""
    if key not in TABLES:
        raise ValueError(f"{key!r} is not a table of the built-in corpus: {', '.join(TABLES)}")
    if key == "diabetes":
        return _diabetes()
    if key == "linnerud":
        return _linnerud()
    bundle = getattr(datasets, f"load_{key}")()
    columns = tuple(str(name).replace(" (cm)", "").replace("_", " ") for name in bundle.feature_names)
    title, rows_are, class_word, classes = {
        "iris": ("iris flowers", "flowers", "species", tuple(map(str, bundle.target_names))),
        "wine": ("Italian wines", "wines", "cultivar", ("cultivar A", "cultivar B", "cultivar C")),
        "breast_cancer": ("breast tumours", "tumours", "diagnosis", tuple(map(str, bundle.target_names))),
    }[key]
    columns = tuple(name.replace("od280/od315 of diluted wines", "dilution") for name in columns)
    return Table(title, rows_are, columns, bundle.data, bundle.target.astype(int), class_word, classes)


def _diabetes() -> Table:
    bundle = datasets.load_diabetes(scaled=False)
    columns = (
        "age", "sex", "body mass index", "blood pressure", "cholesterol", "low density lipoproteins",
        "high density lipoproteins", "cholesterol ratio", "triglycerides", "blood sugar", "disease progression",
    )  # fmt: skip
    values = np.column_stack([bundle.data, bundle.target])
    # The table codes sex as 1 and 2 without saying which is which, and so do we.
    labels = bundle.data[:, 1].astype(int) - 1
    return Table("diabetes patients", "patients", columns, values, labels, "sex", ("sex 1", "sex 2"))


def _linnerud() -> Table:
    bundle = datasets.load_linnerud()
    columns = ("chin-ups", "sit-ups", "jumps", "weight", "waist", "pulse")
    values = np.column_stack([bundle.data, bundle.target])
    return Table("fitness club men", "men", columns, values, np.zeros(len(values), dtype=int), "group", ("men",))
