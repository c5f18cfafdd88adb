"""corpus, pairs, clean and pack on small data, held to counts of their own: nothing lost, nothing twice."""

import re
from collections import Counter, defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import storage
from moca_core import sources as layouts
from moca_core.data.duplicates import CleanRules
from moca_core.data.quality import TextBounds
from moca_core.data.render import Renderer, load_tokenizer
from moca_core.spec import BackboneSpec
from moca_core.types import Document, Segment
from pipelines.cleaned import CleanedCorpus
from pipelines.runner.record import Artifact
from pipelines.sources import Source
from pipelines.steps.clean import clean_step
from pipelines.steps.corpus import CorpusConfig, corpus_step
from pipelines.steps.pack import PackConfig, pack_step
from pipelines.steps.pairs import PairsConfig, pairs_step
from pipelines.tables import read_table
from tests.pipelines.conftest import (
    HELD_OUT,
    LOGO,
    REASONS,
    ROWS_PER_FILE,
    SCHEMA,
    Books,
    documents_of,
    files_of,
    rejected_of,
    run_step,
    write_pairs,
    write_texts,
    write_web,
)

ROOT = Path(__file__).parents[2]
KICAD = ROOT.parent / "shared" / "data" / "kicad"
FILES, LINES = 8, 12
RULES = CleanRules(max_image_copies=5)
# Windows of several row groups: those of the built-in documents hold 64.
PACK = PackConfig(max_tokens=96, row_tokens=256, window=40 if KICAD.exists() else 240)

pytestmark = pytest.mark.usefixtures("ray_session")


class Made:
    """The four steps, run once; `rows` is what their sources hold."""

    def __init__(self, folder: Path, base: Artifact) -> None:
        write_pairs(folder / "pairs")
        write_texts(folder / "lines", LINES)
        web_rows = write_web(folder / "web", FILES)
        real = Source("obelics", str(KICAD / "interleaved")) if KICAD.exists() else Source("builtin")
        self.sources = (Source("obelics", str(folder / "web")), Source("text", str(folder / "lines")), real)
        self.rows = [web_rows, LINES, count_rows(real)]
        config = CorpusConfig(sources=self.sources)
        train = Source("triplets", str(folder / "pairs" / "train"))
        evaluate = Source("mmeb", str(folder / "pairs" / "evaluate"))
        self.books = Books()
        self.base, self.uri = base, str(folder)
        self.corpus = run_step(corpus_step(config), f"{folder}/corpus", self.books)
        self.pairs = run_step(
            pairs_step(PairsConfig(train=(train,), evaluate=(evaluate,))), f"{folder}/pairs-out", self.books
        )
        self.clean = self.cleaned(RULES, "clean")
        self.pack = run_step(
            pack_step(PACK), f"{folder}/pack", self.books, corpus=self.corpus, clean=self.clean, base=base
        )
        self.documents = documents_of(self.corpus)

    def cleaned(self, rules: CleanRules, name: str) -> Artifact:
        return run_step(clean_step(rules), f"{self.uri}/{name}", self.books, corpus=self.corpus, pairs=self.pairs)

    def left(self) -> list[Document]:
        """What should be left of the documents: found here with dicts and sets, in the order of the parts."""
        seen: set[tuple] = set()
        copies: Counter[bytes] = Counter()
        left = []
        for document in (d for part in self.documents for d in part):
            content = []
            here = set()
            for segment in document.content:
                if segment.image is None:
                    content.append(segment)
                    continue
                if segment.image not in here:
                    copies[segment.image] += 1
                    here.add(segment.image)
                if segment.image != HELD_OUT and copies[segment.image] <= RULES.max_image_copies:
                    content.append(segment)
            if document.content not in seen and content:
                left.append(Document(document.source, tuple(content), document.where))
            seen.add(document.content)
        return left

    def packed(self) -> list[dict]:
        return [row for file, _ in self.pack.result["files"] for row in read_table(self.pack.path(file)).to_pylist()]


def count_rows(source: Source) -> int:
    if source.layout == "builtin":
        adapter = source.adapter(layouts.DOCUMENTS)
        return sum(1 for unit in adapter.list_units(None) for _ in adapter.read_unit(None, unit))
    return sum(pq.read_metadata(file).num_rows for file in Path(source.path).glob("*.parquet"))


@pytest.fixture(scope="module")
def made(ray_session, base: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"), base)


def test_every_row_is_a_document_or_a_rejection(made: Made) -> None:
    result = made.corpus.result
    rejected = rejected_of(made.corpus)
    assert Counter(row["reason"] for row in rejected) == result["rejected"]
    assert result["documents"] + len(rejected) == sum(made.rows)
    assert result["documents"] == sum(map(len, made.documents))
    places = [d.where for part in made.documents for d in part] + [row["where"] for row in rejected]
    assert len(set(places)) == len(places) == sum(made.rows)
    expected = Counter([list(REASONS)[n % len(REASONS)] for n in range(FILES)] + ["malformed_json"])
    assert expected <= Counter(result["rejected"])
    by_source = Counter(row["source"] for row in read_table(made.corpus.path("groups.parquet")).to_pylist())
    assert set(by_source) == {0, 1, 2} and len(result["sources"]) == 3
    assert made.books.metrics["rejected/malformed_json"] == 1 and len(made.books.datasets) >= 5


def test_what_was_rejected_is_found_again_by_its_place(made: Made) -> None:
    rejected = [row for row in rejected_of(made.corpus) if "/web-" in row["where"] or "/lines-" in row["where"]]
    assert len(rejected) == FILES + 1
    for row in rejected:
        assert row["detail"]
        if line := re.fullmatch(r"(.*) byte (\d+)", row["where"]):
            assert Path(line[1]).read_bytes()[int(line[2]) :].startswith(b'{"text": "cut\n')
        else:
            file, number = re.fullmatch(r"(.*) row (\d+)", row["where"]).groups()
            found = pq.read_table(file).slice(int(number), 1).to_pylist()[0]
            assert (found["texts"], found["images"]) == REASONS[row["reason"]]


def test_documents_say_where_they_stood(made: Made) -> None:
    for document in made.documents[0] + made.documents[3]:
        file, number = re.fullmatch(r"(.*) row (\d+)", document.where).groups()
        found = pq.read_table(file).slice(int(number), 1).to_pylist()[0]
        assert [s.text for s in document.content] == found["texts"]
        assert [s.image for s in document.content] == found["images"]


def test_what_the_cleaning_takes_out_is_counted(made: Made) -> None:
    dropped = [row for file in made.clean.result["dropped"] for row in read_table(made.clean.path(file)).to_pylist()]
    counts = made.clean.result["counts"]
    assert Counter(row["reason"] for row in dropped) == counts
    assert counts["image_in_evaluation"] >= FILES and counts["image_copies"] >= FILES - RULES.max_image_copies
    whole = {(row["part"], row["row"]) for row in dropped if row["segment"] == -1}
    assert len(whole) == counts["duplicate_document"] >= FILES
    cleaned = CleanedCorpus.of(made.corpus, made.clean)
    read = [document for group in cleaned.groups() for document in cleaned.read(group)]
    assert read == made.left() and [d.where for d in read] == [d.where for d in made.left()]
    emptied = made.corpus.result["documents"] - len(whole) - len(read)
    assert emptied == 0  # nothing of this corpus is only such images
    for row in dropped:
        (document,) = (d for n, d in enumerate(made.documents[row["part"]]) if n == row["row"])
        if row["reason"] == "image_in_evaluation":
            assert document.content[row["segment"]].image == HELD_OUT


def test_cleaning_rules_can_be_switched_off_one_by_one(made: Made) -> None:
    off = {"duplicates": False, "max_image_copies": None, "decontaminate": False}
    counts = made.clean.result["counts"]
    assert made.cleaned(CleanRules(**off), "off").result["counts"] == {}
    assert made.cleaned(CleanRules(**{**off, "duplicates": True}), "one").result["counts"] == {
        "duplicate_document": counts["duplicate_document"]
    }
    assert made.cleaned(CleanRules(**{**off, "decontaminate": True}), "two").result["counts"] == {
        "image_in_evaluation": counts["image_in_evaluation"]
    }


def test_every_piece_is_packed_once_and_says_what_its_document_said(made: Made) -> None:
    spec = BackboneSpec.from_dict(made.base.result["spec"])
    tokenizer = load_tokenizer(made.base.path("tokenizer.json"))
    renderer = Renderer(tokenizer, spec, PACK.max_tokens)
    expected = {f"{d.doc_id}:{k}": p for d in made.left() for k, p in enumerate(renderer.pieces(d.content))}
    found: dict[str, tuple] = {}
    for row in made.packed():
        assert len(row["input_ids"]) == sum(row["segment_lengths"]) <= PACK.budget_tokens
        start, images = 0, iter(row["images"])
        for name, length in zip(row["piece_ids"], row["segment_lengths"], strict=True):
            assert name not in found, f"{name} is there twice"
            ids = row["input_ids"][start : start + length]
            found[name] = ids, [next(images) for _ in range(ids.count(spec.vision_start_token_id))]
            start += length
        assert not list(images)
    assert found.keys() == expected.keys() and len(found) == made.pack.result["pieces"] > 100
    assert all(found[name] == (piece.input_ids, piece.images) for name, piece in expected.items())
    names_of = defaultdict(list)
    for name in sorted(found, key=lambda name: int(name.split(":")[1])):
        names_of[name.split(":")[0]].append(name)
    for document in made.left()[::7]:
        names = names_of[document.doc_id]
        ids = [i for name in names for i in found[name][0] if i not in spec.special_token_ids]
        joined = ""
        for before, segment in zip((None, *document.content), document.content, strict=False):
            if segment.text is not None:
                joined += ("\n\n" if before is not None and before.text is not None else "") + segment.text
        assert tokenizer.decode(ids) == joined
        assert [i for name in names for i in found[name][1]] == [s.image for s in document.content if s.image]


def test_index_totals_and_mixture_agree_with_the_rows(made: Made) -> None:
    spec = BackboneSpec.from_dict(made.base.result["spec"])
    result, rows = made.pack.result, made.packed()
    index = read_table(made.pack.path(result["index"])).to_pylist()
    addresses = [(file, row) for file, (_, count) in enumerate(result["files"]) for row in range(count)]
    assert [(line["file"], line["row"]) for line in index] == addresses and len(rows) == result["rows"]
    assert [line["tokens"] for line in index] == [len(row["input_ids"]) for row in rows]
    assert [line["cost_flops"] for line in index] == [row["cost_flops"] for row in rows]
    tokens = sum(len(row["input_ids"]) for row in rows)
    image_tokens = sum(row["input_ids"].count(spec.image_token_id) for row in rows)
    assert (result["tokens"], result["image_tokens"]) == (tokens, image_tokens)
    assert result["fill"] == pytest.approx(tokens / len(rows) / PACK.budget_tokens)
    assert result["cost_flops"] == pytest.approx(sum(row["cost_flops"] for row in rows))
    shares = [share for names in result["mixture"].values() for share in names.values()]
    assert sum(share["tokens"] for share in shares) == tokens
    assert sum(share["image_tokens"] for share in shares) == image_tokens
    assert sum(share["images"] for share in shares) == sum(len(row["images"]) for row in rows)
    left = Counter(document.source for document in made.left())
    assert Counter({name: s["documents"] for names in result["mixture"].values() for name, s in names.items()}) == left
    assert list(result["mixture"]) == made.corpus.result["sources"]
    assert sum(v for k, v in made.books.metrics.items() if k.startswith("mixture/")) == pytest.approx(1)
    assert any(path.endswith("mixture.txt") for path in made.books.artifacts)


def test_windows_mix_the_corpus(made: Made) -> None:
    assert len(made.pack.result["files"]) > 5
    by_file = [
        {name.split(":")[0] for row in read_table(made.pack.path(file)).to_pylist() for name in row["piece_ids"]}
        for file, _ in made.pack.result["files"]
    ]
    part_of = {d.doc_id: part for part, documents in enumerate(made.documents) for d in documents}
    assert sum(len({part_of.get(doc) for doc in docs}) > 1 for docs in by_file) > len(by_file) / 2


def test_pairs_are_counted_and_held_out_ones_are_left_out(made: Made) -> None:
    result = made.pairs.result
    assert result["rejected"] == {"no_positive": 2, "pair_in_evaluation": 1}
    assert {name: sum(rows for _, rows in files) for name, files in result["train"].items()} == {
        "train/t0": 28,  # a row without an answer, and one that the task asks
        "train/t1": 29,
    }
    queries = []
    for files in result["train"].values():
        for file, rows in files:
            table = read_table(made.pairs.path(file)).slice(0, rows)
            queries += [row["query"][0]["text"].split()[1] for row in table.to_pylist()]
    assert sorted(map(int, queries)) == [n for n in range(60) if n not in (2, 5, 32)]
    where = {row["reason"]: row["where"] for row in rejected_of(made.pairs)}
    assert re.fullmatch(r".*/t0\.jsonl byte \d+", where["pair_in_evaluation"])
    assert {name: (t["queries"], t["candidates"]) for name, t in result["tasks"].items()} == {
        "evaluate/task/text-to-image": (1, 1),
        "evaluate/task/text-to-text": (1, 1),
    }


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve units of eleven good rows each, and three of lines."""
    folder = tmp_path_factory.mktemp("sources")
    write_web(folder / "web", 12)
    write_texts(folder / "lines", 20, files=3)
    return folder


def corpus_of(uri: Path, *sources: Source, **options) -> Artifact:
    return run_step(corpus_step(CorpusConfig(sources=sources, **options)), str(uri))


def test_a_limit_cuts_exactly_and_reads_no_more_than_it_needs(made, web: Path, tmp_path: Path, base: Artifact) -> None:
    corpus = corpus_of(tmp_path / "corpus", Source("obelics", str(web / "web"), limit=25))
    documents = [d for part in documents_of(corpus) for d in part]
    assert corpus.result["documents"] == len(documents) == len({d.where for d in documents}) == 25
    assert corpus.result["parts"] <= 4  # of twelve: three, and one more if those gave too few
    cleaned = CleanedCorpus(corpus.uri, "", ())
    assert [d.where for group in cleaned.groups() for d in cleaned.read(group)] == [d.where for d in documents]
    off = CleanRules(duplicates=False, max_image_copies=None, decontaminate=False)
    clean = run_step(clean_step(off), str(tmp_path / "clean"), corpus=corpus, pairs=made.pairs)
    pack = run_step(pack_step(PACK), str(tmp_path / "pack"), corpus=corpus, clean=clean, base=base)
    assert sum(s["documents"] for names in pack.result["mixture"].values() for s in names.values()) == 25


def test_weights_share_out_the_rows_and_the_seed_alone_draws_them(web: Path, tmp_path: Path) -> None:
    sources = (Source("obelics", str(web / "web"), weight=3), Source("text", str(web / "lines"), weight=1))
    one, two, other = (
        corpus_of(tmp_path / str(n), *sources, max_rows=40, seed=seed) for n, seed in enumerate((1, 1, 2))
    )
    rows = Counter()
    for group in read_table(one.path("groups.parquet")).to_pylist():
        rows[group["source"]] += group["documents"]
    assert rows == {0: 30, 1: 10} and one.result["documents"] == 40
    folders = ("documents", "keys", "rejected", "groups.parquet")
    assert one.result == two.result and files_of(one.uri, *folders) == files_of(two.uri, *folders)
    drawn = [{d.where for part in documents_of(corpus) for d in part} for corpus in (one, other)]
    assert drawn[0] != drawn[1] and len(drawn[1]) == 40


def test_bad_images_may_leave_their_documents_and_are_counted(web: Path, tmp_path: Path) -> None:
    source = Source("obelics", str(web / "web"))
    corpus = corpus_of(tmp_path, source, drop_bad_images=True)
    images = ("not_an_image", "image_truncated", "image_missing")
    broken = Counter(list(REASONS)[n % len(REASONS)] for n in range(12))
    dropped = {f"dropped_{reason}": broken[reason] for reason in images}
    rest = {reason: count for reason, count in broken.items() if reason not in images}
    assert corpus.result["rejected"] == dropped | rest
    assert corpus.result["documents"] == 12 * ROWS_PER_FILE - sum(rest.values())
    kept = {d.where: d for part in documents_of(corpus) for d in part}
    for row in rejected_of(corpus):
        if row["reason"].startswith("dropped_"):
            where, segment = re.fullmatch(r"(.*) segment (\d+)", row["where"]).groups()
            texts, images_there = REASONS[row["reason"].removeprefix("dropped_")]
            assert images_there[int(segment)] is not None
            assert kept[where].content == tuple(Segment(text=t) for t in texts if t is not None)


def test_too_much_that_is_broken_fails_with_the_reasons(web: Path, tmp_path: Path) -> None:
    source = Source("obelics", str(web / "web"))
    message = r"corpus: 9 of 141 rows rejected \(.*not_an_image 2.*\), more than max_rejected_fraction=0.05"
    with pytest.raises(ValueError, match=message):
        corpus_of(tmp_path / "most", source, max_rejected_fraction=0.05)
    assert not storage.exists(str(tmp_path / "most" / "groups.parquet"))
    assert len(rejected_of(Artifact(str(tmp_path / "most"), {}))) == 12  # to be looked at
    corpus = corpus_of(tmp_path / "off", source, text=TextBounds(None, None, None, None), max_rejected_fraction=0.07)
    assert "text_too_short" not in corpus.result["rejected"] and "repeated_lines" not in corpus.result["rejected"]
    with pytest.raises(ValueError, match=r"nothing usable in 144 rows \(text_too_long 133, "):
        corpus_of(tmp_path / "none", source, text=TextBounds(max_characters=1))


def test_a_document_that_the_cleaning_leaves_empty_is_counted(made, tmp_path: Path, base: Artifact) -> None:
    (tmp_path / "web").mkdir()
    rows = [{"texts": [f"number {n}", None], "images": [None, LOGO]} for n in range(3)]
    rows += [{"texts": [None], "images": [LOGO]}, {"texts": ["a text of its own, long enough"], "images": [None]}]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), tmp_path / "web" / "a.parquet")
    corpus = corpus_of(tmp_path / "corpus", Source("obelics", str(tmp_path / "web")))
    rules = CleanRules(max_image_copies=1)
    clean = run_step(clean_step(rules), str(tmp_path / "clean"), corpus=corpus, pairs=made.pairs)
    assert clean.result["counts"] == {"image_copies": 3}
    pack = run_step(pack_step(PACK), str(tmp_path / "pack"), corpus=corpus, clean=clean, base=base)
    assert pack.result["emptied"] == 1
    assert sum(s["documents"] for names in pack.result["mixture"].values() for s in names.values()) == 4
