"""Search and choice of hard negatives against double loops."""

from collections import defaultdict

import numpy as np
import pytest

from moca_core.data.answers import REASONS, Answers, pair_keys
from moca_core.mining import Nearest, best_of, choose, nearest
from moca_core.types import Content, Pair, Segment, content_id


def text(word: str) -> Content:
    return (Segment(text=word),)


def picture(data: bytes) -> Content:
    return (Segment(image=data),)


def by_hand(queries, corpus, k, barred):
    """[(score, entry)] of every query: all of them sorted, equal scores in order of entries."""
    result = []
    for row, query in enumerate(queries.astype(np.float64)):
        scored = [(float(query @ vector), entry) for entry, vector in enumerate(corpus.astype(np.float64))]
        allowed = [(score, entry) for score, entry in scored if (row, entry) not in barred]
        result.append(sorted(allowed, key=lambda item: (-item[0], item[1]))[:k])
    return result


def blocks_of(corpus, size):
    return [corpus[start : start + size] for start in range(0, len(corpus), size)]


def draw_barred(rng, rows, entries, share):
    return {(r, e) for r in range(rows) for e in range(entries) if rng.random() < share}


def columns_of(barred):
    rows, entries = zip(*sorted(barred, key=lambda item: hash(item)), strict=True)
    return np.array(rows), np.array(entries)


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
@pytest.mark.parametrize("k", [1, 5, 40])
def test_nearest_is_what_sorting_everything_gives(block, k):
    """Whole numbers: scores are exact, and many are equal."""
    rng = np.random.default_rng(block * 100 + k)
    queries, corpus = (rng.integers(-2, 3, (n, 4)).astype(np.float32) for n in (23, 150))
    barred = draw_barred(rng, 23, 150, 0.2)
    columns = columns_of(barred)
    found = nearest(queries, blocks_of(corpus, block), k, columns)
    expected = by_hand(queries, corpus, k, barred)
    assert [
        list(zip(s, e, strict=True)) for s, e in zip(found.scores.tolist(), found.entries.tolist(), strict=True)
    ] == expected
    assert len({score for row in expected for score, _ in row}) < 40  # most of them equal
    assert found.barred_scores.tolist() == [float(queries[r] @ corpus[e]) for r, e in zip(*columns, strict=True)]


def test_nearest_of_unit_vectors_agrees_with_numpy():
    rng = np.random.default_rng(0)
    queries, corpus = (rng.normal(size=(n, 32)).astype(np.float32) for n in (50, 700))
    queries, corpus = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (queries, corpus))
    nothing = (np.empty(0, dtype=np.int64),) * 2
    one, other = (nearest(queries, blocks_of(corpus, size), 20, nothing) for size in (64, 700))
    np.testing.assert_array_equal(one.entries, np.argsort(-(queries @ corpus.T), axis=1)[:, :20])
    np.testing.assert_array_equal(one.entries, other.entries)
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-6)


def test_fewer_candidates_than_k_and_a_query_with_none():
    corpus, queries = np.eye(3, dtype=np.float32), np.ones((2, 3), dtype=np.float32)
    found = nearest(queries, [corpus[:2], corpus[2:]], 5, (np.array([0, 1, 1, 1]), np.array([1, 0, 1, 2])))
    assert found.entries.tolist() == [[0, 2, -1, -1, -1], [-1] * 5]
    assert found.scores[0].tolist() == [1, 1, -np.inf, -np.inf, -np.inf]
    choice = choose(found, np.array([2.0, 2.0]), negatives=4, skip_top=0, max_positive_share=0.95)
    assert choice.kept.tolist() == [[True, True, False, False, False], [False] * 5]


def barred_by_hand(pairs: list[Pair]) -> dict[int, dict[Content, str]]:
    """{pair: {content: reason}} by comparing every pair with every other."""
    groups = defaultdict(set)
    for pair in pairs:
        for content in pair.positives:
            groups[pair.group or content_id(content)].add(content)
    named = {content for pair in pairs for content in (*pair.positives, *pair.negatives)}
    result = {}
    for place, pair in enumerate(pairs):
        barred = {pair.query: "query_itself"} if pair.query in named else {}
        twins = [other for other in pairs if other.query == pair.query]
        for other in twins:
            barred |= {c: "same_group" for p in other.positives for c in groups[other.group or content_id(p)]}
        barred |= {c: "equal_query" for other in twins for c in other.positives}
        result[place] = barred | {c: "own_positive" for c in pair.positives}
    return result


def random_pairs(rng) -> list[Pair]:
    """Few words, so that queries are equal, groups overlap, and an answer is also asked or wrong elsewhere."""
    words = [text(f"w{n}") for n in range(25)] + [picture(bytes([n])) for n in range(10)]

    def some(low, high):
        return tuple(words[i] for i in rng.choice(len(words), rng.integers(low, high), replace=False))

    groups = [None, None, "a", "b", "c"]
    return [Pair("t", *some(1, 2), some(1, 4), some(0, 4), groups[rng.integers(5)]) for _ in range(40)]


@pytest.mark.parametrize("seed", range(5))
def test_barred_answers_are_those_that_a_double_loop_finds(seed):
    pairs = random_pairs(np.random.default_rng(seed))
    answers = Answers(pair_keys(pairs))
    named = [[*pair.positives, *pair.negatives] for pair in pairs]
    contents = [named[p][place] for p, place in zip(answers.pair, answers.place, strict=True)]
    assert contents == list(dict.fromkeys(content for answer in named for content in answer))
    expected = barred_by_hand(pairs)
    seen = set()
    for pairs_asked in (range(0, 13), range(13, 40)):
        barred = answers.barred(pairs_asked)
        found = defaultdict(dict)
        for row, entry, reason in zip(barred.rows, barred.entries, barred.reasons, strict=True):
            assert contents[entry] not in found[pairs_asked[row]], "said twice"
            found[pairs_asked[row]][contents[entry]] = REASONS[reason]
        assert found == {pair: expected[pair] for pair in pairs_asked}
        seen |= {reason for reasons in found.values() for reason in reasons.values()}
    assert seen == set(REASONS)
    firsts = [answers.first_named_by(range(start, start + 8)) for start in range(0, 40, 8)]
    assert [entry for part in firsts for entry in range(part.start, part.stop)] == list(range(len(answers)))
    assert all((answers.pair[part] // 8 == n).all() for n, part in enumerate(firsts))


FOUND = Nearest(
    scores=np.array([[0.9, 0.8, 0.7, 0.6, 0.5], [0.9, 0.8, 0.7, 0.6, -np.inf]], dtype=np.float32),
    entries=np.array([[4, 3, 2, 1, 0], [4, 3, 2, 1, -1]]),
    barred_scores=np.empty(0),
)


@pytest.mark.parametrize(
    ("options", "positive", "kept"),
    [
        ({"max_positive_share": None}, 0.1, [0, 1]),
        ({"max_positive_share": 0.95}, 0.1, []),
        ({"max_positive_share": 0.95}, 0.8, [2, 3]),  # 0.76
        ({"max_positive_share": 0.8}, 0.8, [3]),  # 0.64
        ({"max_positive_share": None, "skip_top": 1}, 0.1, [1, 2]),
        ({"max_positive_share": 0.95, "skip_top": 3}, 0.9, [3]),
        ({"max_positive_share": 0.9}, -0.5, []),
    ],
)
def test_choice_keeps_the_nearest_that_pass(options, positive, kept):
    choice = choose(FOUND, np.full(2, positive), **{"negatives": 2, "skip_top": 0, **options})
    assert np.flatnonzero(choice.kept[1]).tolist() == kept
    assert not (choice.kept & (choice.skipped | choice.too_near)).any() and not (choice.skipped & choice.too_near).any()


def test_a_right_answer_below_0_bars_what_scores_above_it():
    found = Nearest(np.array([[-0.4, -0.52, -0.6]]), np.array([[0, 1, 2]]), np.empty(0))
    choice = choose(found, np.array([-0.5]), negatives=3, skip_top=0, max_positive_share=0.9)
    assert choice.kept.tolist() == [[False, False, True]]  # above -0.55 is too near


def test_sampling_draws_among_all_that_pass_by_its_key():
    rng = np.random.default_rng(0)
    scores = -np.sort(-rng.random((400, 10)).astype(np.float32), axis=1)
    found = Nearest(scores, np.tile(np.arange(10), (400, 1)), np.empty(0))
    options = {"negatives": 3, "skip_top": 2, "max_positive_share": None}
    one, same, other = (choose(found, np.ones(400), **options, sample=(seed, "task")).kept for seed in (1, 1, 2))
    assert (one == same).all() and (one != other).any()
    assert (one.sum(1) == 3).all() and not one[:, :2].any()
    drawn = one[:, 2:].sum(0)  # 150 expected, standard deviation 10
    assert drawn.min() > 105 and drawn.max() < 195


def test_the_best_right_answer_counts():
    assert best_of(np.array([0, 1, 0, 1]), np.array([0.1, 0.5, 0.3, 0.2]), 3).tolist() == pytest.approx(
        [0.3, 0.5, -np.inf]
    )
