"""The combinations: which columns of which table are drawn as what, and what one would say about the picture.

A combination can be drawn in any number of variants (other rows, colours, markers and widths),
all from the generator it is given.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from moca_core.sources.builtin.canvas import Canvas, random_look
from moca_core.sources.builtin.drawing import KINDS
from moca_core.sources.builtin.tables import Table, table

_ROWS_DRAWN = (0.65, 0.9)  # the share of a table's rows that a variant shows

# Two ways to say each kind. {by} is the word for the table's classes.
_NOUNS = {
    "scatter": ("scatter plot", "cloud of points"),
    "scatter_by_class": ("scatter plot coloured by {by}", "cloud of points with one colour for each {by}"),
    "scatter_with_line": ("scatter plot with a fitted line", "cloud of points and its regression line"),
    "bubbles": ("bubble chart", "plot of circles of different sizes"),
    "histogram": ("histogram", "row of bars counting how often each value occurs"),
    "histogram_by_class": ("pair of overlapping histograms by {by}", "histogram with one shape for each {by}"),
    "group_means": ("bar chart of five means", "row of five bars"),
    "class_means": ("grouped bar chart by {by}", "group of bars with one bar for each {by}"),
    "sorted_curve": ("curve of sorted values", "line through the values from smallest to largest"),
    "cumulative": ("filled cumulative distribution", "area under the share of rows below each value"),
    "stems": ("stem plot", "row of vertical lines with dots"),
    "row_line": ("zigzag line over the rows", "line chart in the order of the rows"),
    "boxes": ("box plot by {by}", "set of boxes with whiskers, one for each {by}"),
    "violins": ("violin plot by {by}", "set of smooth mirrored shapes, one for each {by}"),
    "density": ("heat map of counts", "grid of coloured cells showing how dense the points are"),
    "correlation": ("correlation matrix", "square of coloured cells showing correlations"),
    "parallel": ("parallel coordinates plot", "bundle of lines across all axes"),
    "shares": ("pie chart by {by}", "circle cut into one slice for each {by}"),
    "radar": ("radar chart by {by}", "closed outline around a circle for each {by}"),
}
_TEMPLATES = (
    "A {noun} of {what} in the {title} table.",
    "{title}: {what}, drawn as a {noun}.",
    "This picture shows {what} of {rows} as a {other}.",
    "A {other}: {what} from the table of {title}.",
)
DESCRIPTIONS_PER_COMBINATION = len(_TEMPLATES)


@dataclass(frozen=True)
class Combination:
    """What is drawn. `columns` are names of the table's columns; none means all of them."""

    table_key: str
    kind: str
    columns: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "/".join((self.table_key, self.kind, *self.columns))

    @property
    def table(self) -> Table:
        return table(self.table_key)

    @property
    def column_indices(self) -> list[int]:
        return [self.table.column(name) for name in self.columns] or list(range(len(self.table.columns)))


def _of(table_key: str, **kinds: tuple[tuple[str, ...], ...]) -> tuple[Combination, ...]:
    return tuple(Combination(table_key, kind, columns) for kind, sets in kinds.items() for columns in sets)


# Chosen so that no two look alike whatever the colours are.
COMBINATIONS = (
    *_of(
        "iris",
        scatter_by_class=(("petal length", "petal width"), ("sepal length", "sepal width")),
        histogram=(("petal length",),),
        boxes=(("petal length",),),
        violins=(("sepal width",),),
        sorted_curve=(("petal width",),),
        correlation=((),),
        parallel=((),),
        shares=((),),
    ),
    *_of(
        "wine",
        scatter_by_class=(("flavanoids", "color intensity"),),
        histogram=(("malic acid",),),
        boxes=(("flavanoids",),),
        bubbles=(("alcohol", "hue", "proline"),),
        class_means=(("malic acid", "flavanoids", "color intensity", "proline"),),
        cumulative=(("proline",),),
        correlation=((),),
        parallel=((),),
        radar=(("alcohol", "malic acid", "flavanoids", "color intensity", "hue", "proline"),),
    ),
    *_of(
        "breast_cancer",
        scatter_with_line=(("mean radius", "mean perimeter"),),
        scatter_by_class=(("mean texture", "worst concave points"),),
        histogram_by_class=(("worst radius",),),
        boxes=(("worst concave points",),),
        violins=(("mean texture",),),
        density=(("mean area", "mean concavity"),),
        sorted_curve=(("area error",),),
        correlation=((),),
        shares=((),),
        class_means=(("mean radius", "mean concavity"),),
    ),
    *_of(
        "diabetes",
        scatter_with_line=(("high density lipoproteins", "cholesterol ratio"),),
        scatter=(("sex", "age"), ("cholesterol", "low density lipoproteins")),
        histogram=(("age",),),
        group_means=(("body mass index", "disease progression"),),
        density=(("age", "blood pressure"),),
        correlation=((),),
    ),
    *_of(
        "linnerud",
        stems=(("jumps",),),
        row_line=(("weight",),),
        bubbles=(("chin-ups", "sit-ups", "waist"),),
        correlation=((),),
        parallel=((),),
    ),
)


def sample_rows(combination: Combination, rng: np.random.Generator) -> np.ndarray:
    """Positions of the rows that a variant shows, in the order of the table."""
    total = len(combination.table.values)
    return np.sort(rng.choice(total, size=round(total * rng.uniform(*_ROWS_DRAWN)), replace=False))


def plot_image(combination: Combination, rows: np.ndarray, rng: np.random.Generator) -> bytes:
    """These rows, drawn in a random look: PNG, 112 x 112 px, RGB."""
    values = combination.table.values[rows][:, combination.column_indices]
    return _canvas().draw(KINDS[combination.kind], values, combination.table.labels[rows], random_look(rng))


def description(combination: Combination, paraphrase: int) -> str:
    """What the picture shows, in one of DESCRIPTIONS_PER_COMBINATION ways; no two combinations share a description."""
    source = combination.table
    noun, other = (words.format(by=source.class_word) for words in _NOUNS[combination.kind])
    text = _TEMPLATES[paraphrase % len(_TEMPLATES)].format(
        noun=noun, other=other, what=what_it_shows(combination), title=source.title, rows=source.rows_are
    )
    return (text[0].upper() + text[1:]).replace("A area", "An area").replace("a area", "an area")


def what_it_shows(combination: Combination) -> str:
    """The columns, as part of a sentence."""
    names = combination.columns
    if not names:
        return "the number of rows" if combination.kind == "shares" else f"all {len(combination.table.columns)} columns"
    if combination.kind == "group_means":
        return f"{names[1]} for rising {names[0]}"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


@lru_cache(maxsize=1)
def _canvas() -> Canvas:
    return Canvas()
