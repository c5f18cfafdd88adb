"""The step `mine` on pairs of texts and images, against embedding everything at once and comparing in a double loop."""

import base64
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from cluster import storage
from cluster.session import ClusterConfig
from moca_core.data.codec import from_bytes
from moca_core.data.render import load_tokenizer
from moca_core.data.schema import row_to_pair
from moca_core.embedder import Embedder
from moca_core.spec import BackboneSpec
from moca_core.types import Content, Pair
from pipelines.dag import build
from pipelines.mining.config import MineConfig
from pipelines.mining.report import Mined
from pipelines.recipe import load_recipe
from pipelines.runner.record import Artifact
from pipelines.sources import Source
from pipelines.steps import finetune, mine
from pipelines.steps.pairs import PairsConfig, pairs_step
from pipelines.tables import read_table
from pipelines.training.pair_streams import make_batch
from tests.pipelines.conftest import Books, png, run_step, words, write_pairs
from tests.tiny import enliven

MINED = MineConfig(negatives=3, top_k=12, max_tokens=64, max_positive_share=None)
TASKS = ("pairs/words", "pairs/pictures")
UNIT = 20  # pairs, of row groups of 16


def image(seed: int) -> dict[str, str]:
    return {"image": f"data:image/png;base64,{base64.b64encode(png(seed)).decode()}"}


def write_lines(folder: Path) -> None:
    """90 pairs of texts in two files: wrong answers of their own, answers said often, equal queries, groups. And 50 of pictures."""
    rng = np.random.default_rng(0)
    answers = [f"answer {n} {words(int(rng.integers(2, 12)), n)}" for n in range(60)]
    texts = []
    for n in range(90):
        row = {"query": f"what {n % 80} {words(5, n % 80)}", "positive": answers[int(rng.integers(60))]}
        row["negatives"] = [f"wrong {n} {words(4, n + 500)}"] + [answers[int(rng.integers(60))]] * (n % 3 == 0)
        row["negatives"] = [wrong for wrong in row["negatives"] if wrong != row["positive"]]
        texts.append(row | ({"group": f"g{n % 4}"} if n % 5 == 0 else {}))
    pictures = [
        {"query": f"which picture {n} {words(3, n)}", "positive": image(n % 30), "task": "pairs/pictures"}
        for n in range(50)
    ]
    folder.mkdir()
    for name, rows in (("words-00000-of-00002", texts[:55]), ("words-00001-of-00002", texts[55:]), ("z", pictures)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@dataclass
class Given:
    """Pairs, and a model that tells contents apart."""

    pairs: Artifact
    model: Artifact
    embedder: Embedder

    def mined(self, uri: Path, config: MineConfig = MINED, **options) -> Artifact:
        step = mine.mine_step(config, "base")
        return run_step(step, str(uri), pairs=self.pairs, base=self.model, **options)


@pytest.fixture(scope="module")
def given(ray_session, base: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Given:
    folder = tmp_path_factory.mktemp("mining")
    write_lines(folder / "pairs")
    write_pairs(folder / "other", rows=3)
    config = PairsConfig(
        train=(Source("jsonl", str(folder / "pairs")),), evaluate=(Source("mmeb", str(folder / "other" / "evaluate")),)
    )
    storage.upload(base.uri, str(folder / "model"))
    enliven(folder / "model")
    model = Artifact(str(folder), {"model": "model"})
    return Given(
        run_step(pairs_step(config), str(folder / "artifact")), model, Embedder(model.path("model"), max_tokens=64)
    )


def set_small_units(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("pipelines.mining.units.UNIT_PAIRS", UNIT)
    patch.setattr(mine, "SEARCH_UNITS", 2)


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    set_small_units(monkeypatch)


def read_pairs(artifact: Artifact) -> dict[str, list[Pair]]:
    return {
        task: [
            row_to_pair(row)
            for file, rows in files
            for row in read_table(artifact.path(file)).slice(0, rows).to_pylist()
        ]
        for task, files in artifact.result["train"].items()
    }


def wrong_answers(pairs: list[Pair]) -> list[list[Content]]:
    """For every pair the answers that nothing says are right, by comparing it with every other pair."""
    named = list(dict.fromkeys(content for pair in pairs for content in (*pair.positives, *pair.negatives)))
    result = []
    for pair in pairs:
        twins = [other for other in pairs if other.query == pair.query]
        groups = {other.group for other in twins} - {None}
        alike = [o for o in pairs if o.group in groups or o.query == pair.query]
        right = {content for other in alike for content in other.positives} | {pair.query}
        result.append([content for content in named if content not in right])
    return result


class Similarity:
    """Cosines of contents, each embedded once, all in one go."""

    def __init__(self, embedder: Embedder, pairs: list[Pair]) -> None:
        contents = list(dict.fromkeys(c for pair in pairs for c in (pair.query, *pair.positives, *pair.negatives)))
        self.vectors = dict(zip(contents, embedder.encode(contents).astype(np.float64), strict=True))

    def __call__(self, one: Content, other: Content) -> float:
        return float(self.vectors[one] @ self.vectors[other])


@pytest.fixture(scope="module")
def plain(given: Given, tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Books, list[str]]:
    """The nearest, nothing filtered by its score; two workers."""
    books, said = Books(), []
    with pytest.MonkeyPatch.context() as patch:
        set_small_units(patch)
        mined = given.mined(tmp_path_factory.mktemp("plain"), books=books, said=said)
    return mined, books, said


def test_mined_negatives_are_the_nearest_wrong_answers(given: Given, plain: tuple) -> None:
    mined, books, said = plain
    before, after = read_pairs(given.pairs), read_pairs(mined)
    assert set(before) == set(after) == set(TASKS) and mined.result["rows_per_group"] == 16
    for task in TASKS:
        assert [replace(p, negatives=()) for p in after[task]] == [replace(p, negatives=()) for p in before[task]]
        similarity = Similarity(given.embedder, before[task])
        for pair, wrong in zip(after[task], wrong_answers(before[task]), strict=True):
            assert set(pair.negatives) <= set(wrong)
            nearest = sorted((similarity(pair.query, content) for content in wrong), reverse=True)[:3]
            assert [similarity(pair.query, content) for content in pair.negatives] == pytest.approx(nearest, abs=1e-5)
            assert len(nearest) == 3
        rights = [max(similarity(p.query, c) for c in p.positives) for p in before[task]]
        wrongs = [similarity(p.query, c) for p in after[task] for c in p.negatives]
        assert books.metrics[f"similarity/positive/{task}"] == pytest.approx(np.mean(rights), abs=1e-5)
        assert books.metrics[f"similarity/mined/{task}"] == pytest.approx(np.mean(wrongs), abs=1e-5)
        assert books.metrics[f"negatives/{task}"] == 3 and books.metrics[f"without/{task}"] == 0
        assert any(line.startswith(f"{task}: {len(before[task])} pairs, 3.00 negatives each") for line in said)
    assert mined.result["mined"]["pairs/words"]["dropped"]["same_group"] > 0
    examples = storage.read_bytes(mined.path("examples.md")).decode()
    assert (
        "## pairs/words" in examples and "- right (best " in examples and "[image, " in examples and "<" not in examples
    )
    assert not any(storage.exists(mined.path(name)) for name in ("vectors", "keys", "found", "state"))


def test_what_scores_near_the_right_answer_is_dropped_and_the_pair_s_own_fill_up(given: Given, tmp_path: Path) -> None:
    share = 0.9
    mined = given.mined(tmp_path, replace(MINED, max_positive_share=share, skip_top=1))
    before, after = read_pairs(given.pairs), read_pairs(mined)
    lengths = defaultdict(int)
    for task in TASKS:
        similarity = Similarity(given.embedder, before[task])
        for pair, full, wrong in zip(before[task], after[task], wrong_answers(before[task]), strict=True):
            right = max(similarity(pair.query, content) for content in pair.positives)
            ranked = sorted(wrong, key=lambda content: -similarity(pair.query, content))[1:12]
            ceiling = right - (1 - share) * abs(right)
            found = [content for content in ranked if similarity(pair.query, content) <= ceiling][:3]
            expected = [*found, *(content for content in pair.negatives if content not in found)][:3]
            scores = [[similarity(pair.query, content) for content in side] for side in (full.negatives, expected)]
            assert scores[0] == pytest.approx(scores[1], abs=1e-5)
            lengths[len(found), len(expected)] += 1
    assert sum(count for (found, full), count in lengths.items() if full > found) > 5  # filled up
    assert sum(count for (_, full), count in lengths.items() if full < 3) > 5  # nothing to fill up with
    figures = mined.result["mined"]
    assert sum(f["without"] for f in figures.values()) == sum(c for (found, _), c in lengths.items() if not found)
    assert all(f["dropped"]["too_near"] > 0 and f["dropped"]["skipped_top"] == f["pairs"] for f in figures.values())


def tables(artifact: Artifact) -> dict[str, bytes]:
    files = [name for name, _ in storage.list_files(artifact.uri) if name.startswith("train/")]
    return {name: storage.read_bytes(artifact.path(name)) for name in files}


def logged(made: type, log: str, broken: Callable[[int], bool]) -> Callable:
    """The pass `made`, which leaves a line for every unit and fails for some; nested, so that Ray ships it by value."""

    def make(*arguments, **options):
        real = made(*arguments, **options)

        def unit(number: int) -> dict:
            if broken(number):
                raise OSError("no space left on device")
            result = real(number)
            with open(log, "a") as file:
                file.write(f"{number}\n")
            return result

        return unit

    return make


@pytest.mark.slow
def test_an_interrupted_mining_on_one_worker_embeds_nothing_twice(
    given: Given, plain: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails while it embeds, then while it searches; the third attempt has what two workers have without any failure."""
    embed, search = mine.Embed, mine.Search
    mined, one = partial(given.mined, tmp_path / "mined"), ClusterConfig(num_workers=1)
    monkeypatch.setattr(mine, "Embed", logged(embed, str(tmp_path / "first"), lambda n: n == 5))
    with pytest.raises(OSError, match="no space left"):
        mined(cluster=one)
    results = tmp_path / "mined" / "state" / "vectors" / "results"
    kept = {n for file in results.glob("*.parquet") for n in pq.read_table(file)["id"].to_pylist()}
    assert 0 < len(kept) < 8 and kept <= set(map(int, (tmp_path / "first").read_text().split()))

    monkeypatch.setattr(mine, "Embed", logged(embed, str(tmp_path / "second"), lambda n: False))
    monkeypatch.setattr(mine, "Search", logged(search, str(tmp_path / "search"), lambda n: n == 1))
    with pytest.raises(OSError, match="no space left"):
        mined(cluster=one)
    assert sorted(map(int, (tmp_path / "second").read_text().split())) == sorted(set(range(8)) - kept)

    monkeypatch.setattr(mine, "Embed", logged(embed, "nowhere", lambda n: True))
    monkeypatch.setattr(mine, "Search", search)
    last = mined(cluster=one)
    assert last.result == plain[0].result and tables(last) == tables(plain[0]) and len(tables(last)) == 8


@pytest.mark.slow
def test_samples_of_a_model_of_one_s_own(given: Given, tmp_path: Path) -> None:
    """The model by its folder, which is known by what it holds; drawn from the top 12, in order of rank."""
    folder = given.model.path("model")
    step = mine.mine_step(replace(MINED, model=folder, sample=True, seed=1), "pretrain")
    assert step.needs == ("pairs",) and folder not in json.dumps(step.config.identity())
    with pytest.raises(ValueError, match=r"mine.model='.*/empty': no config.json there"):
        replace(MINED, model=str(tmp_path / "empty")).identity()
    mined = read_pairs(run_step(step, str(tmp_path / "mined"), pairs=given.pairs))["pairs/words"]
    before = read_pairs(given.pairs)["pairs/words"]
    similarity, ranks = Similarity(given.embedder, before), defaultdict(int)
    for pair, wrong in zip(mined, wrong_answers(before), strict=True):
        top = sorted((similarity(pair.query, content) for content in wrong), reverse=True)[:12]
        drawn = [similarity(pair.query, content) for content in pair.negatives]
        assert drawn == sorted(drawn, reverse=True) and len(drawn) == 3 and min(drawn) >= top[-1] - 1e-5
        for score in drawn:
            ranks[int(np.argmin(np.abs(np.array(top) - score)))] += 1
    assert len(ranks) == 12 and max(ranks.values()) < 50  # of 270 draws; 22.5 expected of each rank


def test_nothing_mined_is_an_error_that_says_why() -> None:
    figures = Mined(pairs=4, without=4, looked_at=40, dropped={"too_near": 40}, positive_similarity=3.96)
    said: list[str] = []
    context = SimpleNamespace(say=said.append, run=Books(), config=replace(MINED, max_positive_share=0.95))
    with pytest.raises(ValueError, match=r"no answer passed.*max_positive_share=0.95.*mine.warmup_steps"):
        mine.report(context, {"t": figures})
    assert "4 pairs, 0.00 negatives each (100.0% have none)" in said[0] and "too_near 100.0%" in said[0]


def test_mined_negatives_are_hard_and_reach_the_batches(given: Given, base: Artifact, plain: tuple) -> None:
    before, after = (read_pairs(artifact)["pairs/words"] for artifact in (given.pairs, plain[0]))
    similarity, rng = Similarity(given.embedder, before), np.random.default_rng(0)
    hard = [similarity(pair.query, content) for pair in after for content in pair.negatives]
    wrongs = zip(before, wrong_answers(before), strict=True)
    easy = [similarity(pair.query, wrong[rng.integers(len(wrong))]) for pair, wrong in wrongs]
    assert np.mean(hard) > np.mean(easy) + 1.5 * np.std(easy)
    files = plain[0].result["train"]["pairs/words"]
    make = partial(
        make_batch,
        config=finetune.FinetuneConfig(num_negatives=3, max_tokens=64),
        spec=BackboneSpec.from_dict(base.result["spec"]),
        tokenizer=base.path(base.result["tokenizer"]),
        files={"pairs/words": [plain[0].path(file) for file, _ in files]},
        rows_per_file={"pairs/words": [rows for _, rows in files]},
        rows_per_group=plain[0].result["rows_per_group"],
    )
    stream = from_bytes(make({"step": 0, "pairs": [("pairs/words", row) for row in range(len(after))]})).stream
    tokenizer = load_tokenizer(base.path(base.result["tokenizer"]))
    ends = zip(stream.cu_seqlens, stream.cu_seqlens[1:], strict=False)
    read = Counter(tokenizer.decode(stream.input_ids[start:end].tolist()) for start, end in ends)
    contents = [content for pair in after for content in (pair.query, *pair.positives, *pair.negatives)]
    assert read == Counter(content[0].text for content in contents)


def test_mining_is_off_unless_asked_for() -> None:
    names = [step.name for step in build(load_recipe("demo", []))]
    assert "mine" not in names and "warmup" not in names
    steps = {step.name: step for step in build(load_recipe("demo", ["mine.negatives=2"]))}
    assert steps["mine"].needs == ("pairs", "pretrain") and steps["finetune"].needs == ("base", "pretrain", "mine")
    assert steps["mine"].config.max_tokens == steps["finetune"].config.max_tokens and "warmup" not in steps
    steps = {
        s.name: s for s in build(load_recipe("demo", ["mine.negatives=2", "mine.warmup_steps=7", "pretrain.steps=0"]))
    }
    assert steps["mine"].needs == ("pairs", "warmup") and steps["warmup"].needs == ("base", "pairs")
    assert steps["warmup"].config == replace(steps["finetune"].config, steps=7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["mine.negatives=2", "mine.model=a", "mine.warmup_steps=3"],
            "model='a' with warmup_steps=3: one of them mines",
        ),
        (["mine.negatives=1", "finetune.num_negatives=2"], "mine.negatives=1 with finetune.num_negatives=2: .* draws"),
        (["mine.negatives=1", "finetune.num_negatives=0"], "mine.negatives=1 with finetune.num_negatives=0: .* draws"),
        (["mine.negatives=90", "mine.skip_top=20"], r"top_k=100 must be at least skip_top \+ negatives = 110"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe("demo", settings)
