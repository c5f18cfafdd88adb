"""What a study makes of scores: means, spread, paired differences, fits."""

import csv

import numpy as np
import pytest
import scipy.stats

from pipelines.recipe import load_recipe
from pipelines.studies.collect import Result
from pipelines.studies.curves import Curve, curves_of, fit, paper_curves
from pipelines.studies.family import FAMILIES, Run, Variant, runs_of
from pipelines.studies.table import lines_of, markdown, scores_csv


def runs(family: str, seeds: int, *changes: str) -> list[Run]:
    return runs_of("demo", list(changes), FAMILIES[family](load_recipe("demo", list(changes))), seeds)


def result(variant: str, seed: int, a: list[float], b: list[float], tokens: int = 10) -> Result:
    return Result(variant, seed, {"a": np.array(a), "b": np.array(b)}, 0.1, tokens, 2.0 * tokens)


FULL, LESS = Variant("full", "all"), Variant("less", "?", ("x.y=1",))


def test_a_line_is_the_mean_and_the_sample_deviation_of_means_over_tasks() -> None:
    results = [result("full", 0, [1, 0, 1, 1], [1, 0], 10), result("full", 1, [1, 1, 1, 1], [0, 0], 30)]
    (line,) = lines_of([FULL, LESS], results)
    scores = line.overall
    assert scores.by_seed == {0: (0.75 + 0.5) / 2, 1: 0.5}
    assert {task: found.by_seed for task, found in line.by_task.items()} == {"a": {0: 0.75, 1: 1}, "b": {0: 0.5, 1: 0}}
    assert scores.mean == pytest.approx(0.5625) and scores.deviation == pytest.approx(0.125 / 2**0.5)
    assert (line.tokens, line.flops) == (20, 40) and scores.difference is None and scores.verdict == ""


def test_differences_are_paired_by_seed_and_tested_over_queries() -> None:
    """Of a seed that the whole method lacks there is none. Ten queries: every pattern of signs counts, so the p-value is exact."""
    ones, zeros = [1.0] * 5, [0.0] * 5
    some = [1.0, 1.0, 1.0, 1.0, 0.0]
    results = [result("full", 0, ones, ones), result("full", 1, ones, some), result("full", 2, some, ones)]
    results += [result("less", 0, zeros, zeros), result("less", 1, zeros, zeros), result("less", 2, zeros, zeros)]
    results += [result("less", 3, ones, ones)]
    lines = lines_of([FULL, LESS], results)
    full, less = (line.overall for line in lines)
    assert less.differences == pytest.approx([-1.0, -0.9, -0.9]) and full.differences == ()
    known = scipy.stats.ttest_1samp(less.differences, 0).confidence_interval(0.95)
    assert (less.difference.low, less.difference.high) == pytest.approx((known.low, known.high))
    assert less.p_value == pytest.approx(2 / 2**10) and less.verdict == "worse"
    assert "-93.3" in markdown(lines) and less.by_seed[3] == 1.0


def test_what_seeds_or_queries_could_explain_is_not_told_apart() -> None:
    half, ones = [1.0, 0.0] * 4, [1.0] * 8
    wide = [result("full", s, half, half) for s in (0, 1)]
    wide += [result("less", 0, ones, ones), result("less", 1, [0.0] * 8, ones)]  # seeds do not agree
    assert lines_of([FULL, LESS], wide)[1].overall.verdict == "not told apart"
    few = [result("full", s, [1.0], [0.0]) for s in (0, 1)] + [result("less", s, [1.0], [1.0]) for s in (0, 1)]
    line = lines_of([FULL, LESS], few)[1].overall  # seeds agree to the digit, on two queries
    assert line.difference.low > 0 and line.p_value == 1.0 and line.verdict == "not told apart"
    assert lines_of([FULL, LESS], [few[0], few[2]])[1].overall.verdict == ""  # one seed


def test_tasks_are_told_apart_each_for_itself() -> None:
    """Better on one task and worse on the other: nothing is left of it over both. Two tests, so a p-value of 2 / 2^8 counts double."""
    ones, zeros = [1.0] * 8, [0.0] * 8
    results = [result("full", seed, ones, zeros) for seed in (0, 1)] + [
        result("less", seed, zeros, ones) for seed in (0, 1)
    ]
    line = lines_of([FULL, LESS], results)[1]
    assert line.overall.verdict == "not told apart" and line.overall.mean == 0.5
    assert {task: scores.verdict for task, scores in line.by_task.items()} == {"a": "worse", "b": "better"}
    assert line.by_task["a"].p_value == pytest.approx(2 * 2 / 2**8)
    assert "0.0 ± 0.0 worse" in markdown([line]) and "100.0 ± 0.0 better" in markdown([line])


def test_every_run_and_task_is_a_line_of_the_csv() -> None:
    rows = list(csv.DictReader(scores_csv([result("full", 0, [1, 0], [1, 1])]).decode().splitlines()))
    assert [(row["variant"], row["task"], float(row["mean"]), row["queries"]) for row in rows] == [
        ("full", "a", 0.5, "2"),
        ("full", "b", 1.0, "2"),
    ]


def test_a_fit_finds_the_line_that_the_points_lie_on() -> None:
    found = fit(
        {25.0: [0.1 + 0.02 * np.log2(25)], 50.0: [0.1 + 0.02 * np.log2(50)], 200.0: [0.1 + 0.02 * np.log2(200)]}
    )
    assert (found.at_1, found.per_doubling.mean) == pytest.approx((0.1, 0.02))
    assert found.per_doubling.low == pytest.approx(0.02, abs=1e-6)
    noisy = fit({1.0: [0.0, 0.2], 2.0: [0.2, 0.4], 4.0: [0.4, 0.6]})
    error = (
        6 * 0.1**2 / 4 / 4
    ) ** 0.5  # residuals of 0.1, two for the line; the places' squares about their mean are 4
    reach = scipy.stats.t.ppf(0.975, 4) * error
    assert noisy.per_doubling.mean == pytest.approx(0.2) and noisy.per_doubling.low == pytest.approx(0.2 - reach)
    assert Curve("x", {1.0: [0.1], 2.0: [0.2]}).fit is None
    assert 0.003 < paper_curves()["MoCa-3B"].fit.per_doubling.mean < 0.006


def test_curves_run_through_the_recipe_itself() -> None:
    family = [
        run for run in runs("scaling", 2) if run.variant.name in ("full", "steps_0.5", "rows_2", "no_pretraining")
    ]
    results = [result(run.variant.name, run.seed, [run.seed], [0]) for run in family]
    curves = curves_of(family, results)
    assert {axis: curve.points for axis, curve in curves.items()} == {
        "steps": {100: [0.0, 0.5], 200: [0.0, 0.5]},
        "rows": {2: [0.0, 0.5], 4: [0.0, 0.5]},
    }
