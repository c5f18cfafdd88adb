"""Mixtures: what is read of every source, in which order, and how much of it; and the settings that say so."""

from collections import Counter

import pytest
import yaml

from moca_core import sources as layouts
from pipelines.mixture import SHOWN, Part, Share, read_mixture, tree, units_needed
from pipelines.recipe import load_recipe
from pipelines.sources import Source, check_layouts, check_mixture, digest, names, targets
from pipelines.steps.pairs import used_files


class Reader:
    """Reads units that hold so many rows; remembers what it was asked, and holds the mixture to its promise."""

    def __init__(self, *sources: list[int], announced: bool = True, gives=lambda rows: rows) -> None:
        self.units = [
            [{"source": n, "unit": k, **({"rows": rows} if announced else {})} for k, rows in enumerate(source)]
            for n, source in enumerate(sources)
        ]
        self.holds = {(n, k): rows for n, source in enumerate(sources) for k, rows in enumerate(source)}
        self.gives, self.calls = gives, []

    def run(self, units):
        if self.calls:
            assert units[: len(self.calls[-1])] == self.calls[-1], "a unit's number must not change"
        self.calls.append(list(units))
        places = [(unit.source, unit.unit["unit"]) for unit in units]
        assert [unit.unit["source"] for unit in units] == [source for source, _ in places]
        assert len(set(places)) == len(places), "a unit twice"
        given = [self.gives(self.holds[place]) for place in places]
        rows = [
            count if unit.limit is None else min(count, unit.limit) for count, unit in zip(given, units, strict=True)
        ]
        return [{"rows": count, "place": place} for count, place in zip(rows, places, strict=True)]

    def read(self, *targets, seed: int = 0) -> list[Part]:
        self.calls.clear()
        parts = read_mixture(self.units, list(targets), seed, self.run)
        assert [part.number for part in parts] == list(range(len(self.calls[-1])))
        assert all(part.source == part.result["place"][0] for part in parts)
        assert all(0 <= part.used <= part.result["rows"] for part in parts)
        return parts


def used(parts: list[Part]) -> dict[int, int]:
    count = Counter()
    for part in parts:
        count[part.source] += part.used
    return dict(count)


def places(parts: list[Part]) -> list[tuple[int, int]]:
    return [part.result["place"] for part in parts]


def test_without_a_target_everything_is_read_at_once_in_order():
    reader = Reader([5, 0, 7], [3])
    parts = reader.read(None, None)
    assert places(parts) == [(0, 0), (0, 1), (0, 2), (1, 0)] and used(parts) == {0: 12, 1: 3}
    assert len(reader.calls) == 1


def test_a_target_reads_no_more_units_than_it_takes_and_cuts_exactly():
    reader = Reader([10] * 50)
    parts = reader.read(37)
    assert used(parts) == {0: 37} and len(parts) == 4 and [part.used for part in parts] == [10, 10, 10, 7]
    assert len(reader.calls) == 1 and all(unit.limit == 37 for unit in reader.calls[0])
    assert used(reader.read(40)) == {0: 40} and len(reader.calls[-1]) == 4
    (part,) = reader.read(4)
    assert part.used == part.result["rows"] == 4  # the task itself stops there


@pytest.mark.parametrize("rows", [1, 10, 1000])
def test_units_that_do_not_announce_their_rows_are_read_by_what_others_gave(rows):
    reader = Reader([rows] * 60, announced=False)
    parts = reader.read(55)
    needed = -(-55 // rows)
    assert used(parts) == {0: 55} and len(parts) == needed
    assert [len(call) for call in reader.calls] == ([1] if needed == 1 else [1, needed])


def test_units_that_give_less_than_they_announce_are_made_up_for():
    reader = Reader([10] * 100, gives=lambda rows: rows // 2)  # half of the rows are rejected
    parts = reader.read(60)
    assert used(parts) == {0: 60} and len(parts) == 12 and len(reader.calls) <= 6
    nothing = Reader([10] * 20, gives=lambda rows: 0)
    assert used(nothing.read(5)) == {0: 0} and len(nothing.calls[-1]) == 20  # all was tried
    nothing = Reader([10] * 20, gives=lambda rows: 0, announced=False)
    assert used(nothing.read(5)) == {0: 0} and len(nothing.calls[-1]) == 20


@pytest.mark.parametrize("announced", [True, False])
def test_a_source_that_runs_dry_gives_what_it_has(announced):
    reader = Reader([3, 4], [10] * 30, [], announced=announced)
    parts = reader.read(100, 25, 5)
    assert used(parts) == {0: 7, 1: 25}
    assert Counter(source for source, _ in places(parts)) == {0: 2, 1: 3}


def test_sources_with_and_without_a_target_stand_side_by_side():
    reader = Reader([10] * 30, [5] * 4, [100] * 3)
    parts = reader.read(45, None, 120)
    assert used(parts) == {0: 45, 1: 20, 2: 120}
    assert Counter(source for source, _ in places(parts)) == {0: 5, 1: 4, 2: 2}


def test_the_seed_alone_decides_what_is_drawn():
    reader = Reader([10] * 40, [7] * 40)
    first = reader.read(100, 70, seed=1)
    assert reader.read(100, 70, seed=1) == first
    others = [places(reader.read(100, 70, seed=seed)) for seed in range(2, 7)]
    assert len({tuple(found) for found in [places(first), *others]}) == 6
    drawn = Counter(place for found in others for place in found if place[0] == 0)
    assert len(drawn) > 25  # five draws of ten from forty, from all over
    assert {k for source, k in places(first) if source == 0} != {k for source, k in places(first) if source == 1}
    alone = Reader([10] * 40).read(100, seed=1)  # another source beside it changes nothing
    assert places(alone) == [place for place in places(first) if place[0] == 0]


def test_a_larger_target_takes_what_a_smaller_one_took_and_more():
    reader = Reader([10] * 40)
    few, many = places(reader.read(50)), places(reader.read(200))
    assert many[: len(few)] == few


def test_units_needed():
    announced = [{"rows": rows} for rows in (5, 0, 5, 5)]
    assert [units_needed(n, [], announced) for n in (-1, 0, 1, 5, 6, 15, 99)] == [0, 0, 1, 1, 3, 4, 4]
    assert units_needed(5, [], []) == 0
    assert [units_needed(n, [4, 6], [{}] * 9) for n in (1, 5, 6, 15)] == [1, 1, 2, 3]
    assert units_needed(10, [0, 0], [{}] * 9) > 0


def source(layout: str = "text", path: str | None = "x", **options) -> Source:
    return Source(layout, path, **options)


def test_weights_share_out_the_rows_and_limits_cap_them():
    given = (source(weight=3), source(weight=1), source(weight=1, limit=50))
    assert targets(given, 1000) == [600, 200, 50]
    assert targets((source(), source(limit=7)), None) == [None, 7]
    assert targets((source(weight=1e-6), source(weight=1)), 100) == [1, 100]  # never nothing
    assert sum(targets((source(weight=1),) * 8, 1000)) == 1000


def test_names_of_sources_are_their_own():
    given = (source(path="a/b/c"), source(path="z/b/c/"), source("builtin", None), source(path="s3://bucket/d"))
    assert names(given) == ["text b/c (1)", "text b/c (2)", "builtin", "text bucket/d"]


@pytest.mark.parametrize(
    ("sources", "max_rows", "message"),
    [
        ((source(weight=1),), None, "weights share out max_rows=None: give both"),
        ((source(),), 5, "weights share out max_rows=5: give both"),
        ((source(weight=1), source()), 5, "weights share out max_rows=5: give both, and a weight to every source"),
        ((source(weight=1), source(weight=1)), 1, "max_rows=1 must be at least the number of sources, 2"),
        ((source(weight=1),), 0, "max_rows=0 must be"),
    ],
)
def test_mixtures_that_cannot_be_are_refused(sources, max_rows, message):
    with pytest.raises(ValueError, match=f"corpus: {message}"):
        check_mixture("corpus", sources, max_rows)
    check_mixture("corpus", (source(weight=1), source(weight=2)), 2)
    check_mixture("corpus", (source(), source(limit=2)), None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "text x: limit=0 must be at least 1"),
        ({"limit": -1}, "limit=-1 must be at least 1"),
        ({"weight": 0.0}, "weight=0.0 must be positive"),
        ({"weight": float("nan")}, "weight=nan must be positive"),
        ({"images": "s3://bucket/images"}, "must lie on the same storage as the path"),
        ({"path": None}, "every layout but 'builtin' needs a path"),
        ({"layout": "builtin"}, "every layout but 'builtin' needs a path, and that has none"),
    ],
)
def test_sources_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        source(**options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "corpus.sources is empty"),
        ((source("obelix"),), "unknown layout 'obelix'; use one of"),
        ((source(columns={"txt": "a"}),), "layout 'text' has no column role 'txt'; there are text"),
        ((source(images="y"),), "layout 'text' has no option images"),
        ((source("builtin", None, columns={"text": "a"}),), "layout 'builtin' has no option columns"),
    ],
)
def test_options_that_a_layout_does_not_have_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        check_layouts("corpus.sources", given, layouts.DOCUMENTS)
    check_layouts("corpus.sources", (source(columns={"text": "a"}), source("obelics", images="y")), layouts.DOCUMENTS)


def test_what_a_source_holds_is_its_identity_and_where_it_lies_is_not(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("the same text")
    here, there = (source(path=str(tmp_path / name)) for name in ("here", "there"))
    assert here.identity() == there.identity()
    for options in ({"limit": 3}, {"weight": 2.0}, {"columns": {"text": "body"}}):
        assert source(path=here.path, **options).identity() != here.identity()
    (tmp_path / "there" / "a.txt").write_text("another text")
    digest.cache_clear()
    assert here.identity() != there.identity()
    with pytest.raises(ValueError, match=r"no data at .*/nowhere"):
        source(path=f"{tmp_path}/nowhere").identity()


def test_a_recipe_says_all_of_it(tmp_path):
    mixture = {
        "sources": [
            {"layout": "text", "path": "a", "weight": 2, "columns": {"text": "body"}},
            {"layout": "obelics", "path": "b", "weight": 1.5, "images": "pictures", "limit": 9},
        ],
        "max_rows": 1000,
        "seed": 7,
        "drop_bad_images": True,
        "text": {"min_characters": None, "max_compression": 20},
    }
    pairs = {
        "train": [{"layout": "triplets", "path": "c", "weight": 1}],
        "max_rows": 10,
        "seed": 3,
        "decontaminate": False,
    }
    clean = {"duplicates": False, "max_image_copies": None, "decontaminate": False}
    path = tmp_path / "mine.yaml"
    given = {"corpus": mixture, "pairs": pairs, "clean": clean, "pack": {"max_tokens": 1024, "row_tokens": 4096}}
    path.write_text(yaml.safe_dump({"recipe": "demo", **given}))
    recipe = load_recipe(str(path), ["clean.max_image_copies=5"])
    first, second = recipe.corpus.sources
    assert (first.weight, first.columns, second.weight, second.images, second.limit) == (
        2.0,
        {"text": "body"},
        1.5,
        "pictures",
        9,
    )
    assert targets(recipe.corpus.sources, recipe.corpus.max_rows) == [571, 9]
    assert (recipe.corpus.seed, recipe.corpus.drop_bad_images) == (7, True)
    assert (recipe.corpus.text.min_characters, recipe.corpus.text.max_compression) == (None, 20.0)
    assert recipe.corpus.text.max_characters == load_recipe("demo", []).corpus.text.max_characters
    assert (recipe.pairs.max_rows, recipe.pairs.seed, recipe.pairs.decontaminate) == (10, 3, False)
    assert (recipe.clean.duplicates, recipe.clean.max_image_copies, recipe.clean.decontaminate) == (False, 5, False)
    assert recipe.pack.budget_tokens == 4096


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("corpus.max_rows=100", r"corpus: weights share out max_rows=100: give both"),
        ("corpus.sources=[{layout: builtin, weight: 1}]", "weights share out max_rows=None"),
        ("corpus.sources=[{layout: text, path: a, limit: 0}]", "limit=0 must be at least 1"),
        ("corpus.sources=[{layout: text, path: a, columns: {body: b}}]", "no column role 'body'; there are text"),
        ("pairs.evaluate=[{layout: builtin, limit: 5}]", "a limit would change what is scored"),
        ("pairs.evaluate=[{layout: builtin, weight: 5}]", "pairs.evaluate: weights share out"),
        ("corpus.max_rejected_fraction=1", "corpus.max_rejected_fraction=1.0 must be at least 0 and below 1"),
        ("clean.max_image_copies=0", "max_image_copies=0 must be at least 1"),
        ("pack.row_tokens=8", "pack.row_tokens=8 must be at least pack.max_tokens"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("demo", [override])


def test_the_tree_adds_up_and_names_every_source():
    wiki = {"physics": Share(10, 4, 3000, 1000), "art": Share(5, 1, 1000, 0)}
    many = {f"site-{n:02d}": Share(1, 0, n, 0) for n in range(20)}
    printed = tree({"text wiki": wiki, "obelics web": many, "pdf": {"manuals": Share(2, 2, 500, 500)}, "none": {}})
    rows = {line[:25].strip(" ├─└│"): line.split() for line in printed.splitlines()}
    assert printed.splitlines()[0].split() == ["documents", "images", "tokens", "of", "images", "share"]
    assert rows["mixture"][-5:] == ["37", "7", "4,690", "32.0%", "100.0%"]
    assert rows["text wiki"][-5:] == ["15", "5", "4,000", "25.0%", "85.3%"]
    assert rows["physics"][-5:] == ["10", "4", "3,000", "33.3%", "64.0%"]
    assert rows["obelics web"][-5:] == ["20", "0", "190", "0.0%", "4.1%"]
    assert rows["none"][-5:] == ["0", "0", "0", "0.0%", "0.0%"]
    assert "manuals" not in rows  # one name below a source says nothing new
    assert rows["site-19"][-3] == "19" and f"{20 - SHOWN + 1} more" in rows and "site-05" not in rows
    assert int(rows[f"{20 - SHOWN + 1} more"][-3]) == sum(range(20 - SHOWN + 1))
    assert len({len(line) for line in printed.splitlines()}) == 1
    assert tree({}).splitlines()[1].split() == ["mixture", "0", "0", "0", "0.0%", "0.0%"]


@pytest.mark.parametrize(
    ("tasks", "used", "shares"),
    [
        ({"a": 39, "b": 1}, 10, {"a": 9, "b": 1}),
        ({"a": 1, "b": 1}, 1, {"b": 1}),
        ({"a": 4, "b": 4}, 8, {"a": 4, "b": 4}),
    ],
)
def test_a_limit_cuts_the_tasks_of_a_part_alike_and_loses_no_row(tasks, used, shares):
    part = Part(3, 0, used, {"rows": sum(tasks.values()), "tasks": tasks})
    assert {name: rows for name, _, rows in used_files(part)} == shares


def test_a_name_of_the_hub_without_its_scheme_is_pointed_to():
    with pytest.raises(ValueError, match=r"write hf://owner/a-dataset"):
        Source("text", "owner/a-dataset").identity()
