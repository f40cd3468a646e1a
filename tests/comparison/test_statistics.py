"""Means, tests and corrections against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fedlabel.comparison.runs import Run, read_run
from fedlabel.comparison.statistics import (
    Column,
    against_baseline,
    columns,
    holm,
    odds,
    over_seeds,
    paired_test,
    show,
)
from tests.comparison.runs import make_run

NAN = math.nan


def test_over_seeds() -> None:
    """1 and 3: mean 2, sample sd sqrt((1 + 1) / 1) = sqrt(2); the third seed has none."""
    stat = over_seeds([1.0, NAN, 3.0])
    assert (stat.mean, stat.sd, stat.count, stat.total) == (2.0, pytest.approx(2**0.5), 2, 3)
    alone, none = over_seeds([5.0]), over_seeds([NAN])
    assert (alone.mean, alone.count, none.count) == (5.0, 1, 0)
    assert math.isnan(alone.sd)
    assert math.isnan(none.mean)


def test_paired_test_by_hand() -> None:
    """Differences 0.1, 0.2, 0.3 over the common seeds 0, 1, 2: mean 0.2, sd 0.1, t = 0.2 / (0.1 / sqrt(3)) = 2 sqrt(3).

    With 2 degrees of freedom P(|T| > t) = 1 - t / sqrt(t^2 + 2) = 1 - 2 sqrt(3) / sqrt(14) = 0.0742. Seeds 7 and 8,
    which only one of them has, do not count.
    """
    difference, p = paired_test({0: 0.5, 1: 0.6, 2: 0.7, 7: 0.0}, {2: 0.4, 1: 0.4, 0: 0.4, 8: 1.0})
    assert difference == pytest.approx(0.2)
    assert p == pytest.approx(1 - 2 * 3**0.5 / 14**0.5)


@pytest.mark.parametrize(
    ("ours", "theirs", "difference"),
    [
        ({0: 0.5}, {0: 0.4}, 0.1),  # one seed
        ({0: 0.5, 1: 0.7}, {0: 0.4, 1: 0.6}, 0.1),  # the same difference twice: no variance
        ({0: 0.5, 1: 0.7}, {0: 0.5, 1: 0.7}, 0.0),
        ({0: 0.5}, {1: 0.4}, NAN),  # no common seed
    ],
)
def test_where_no_test_is_possible(ours: dict[int, float], theirs: dict[int, float], difference: float) -> None:
    found, p = paired_test(ours, theirs)
    assert found == pytest.approx(difference, nan_ok=True)
    assert math.isnan(p)


@pytest.mark.parametrize(
    ("p_values", "corrected"),
    [
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),  # 3 x 0.01, 2 x 0.03, and 1 x 0.04, raised to the one before
        ([0.02, NAN, 0.5], [0.04, NAN, 0.5]),
        ([0.6, 0.6], [1.0, 1.0]),
        ([NAN], [NAN]),
        ([], []),
    ],
)
def test_holm(p_values: list[float], corrected: list[float]) -> None:
    assert holm(p_values) == pytest.approx(corrected, nan_ok=True)


def section_of(tmp_path: Path, **scores: list[float]) -> dict[str, list[Run]]:
    """Makes a row per name with a run per score; "bound" is one that sees every label."""
    section: dict[str, list[Run]] = {}
    for name, values in scores.items():
        for seed, value in enumerate(values):
            bound = ["method.name=supervised", "method.oracle_labels=true"] if name == "bound" else []
            run = read_run(make_run(tmp_path / f"{name}{seed}", f"seed={seed}", *bound, accuracy=[value]))
            assert run is not None
            section.setdefault(name, []).append(run)
    return section


def test_the_baseline_is_the_best_of_the_others(tmp_path: Path) -> None:
    """Means 0.6, 0.5 and 0.2; the bound is left out. Best against second and second against best are one test, so there
    are two in all: the smaller p is doubled, the larger stays."""
    section = section_of(tmp_path, a=[0.5, 0.6, 0.7], b=[0.5, 0.5, 0.5], c=[0.1, 0.2, 0.3], bound=[0.9, 0.9, 0.9])
    tests = against_baseline(section)
    assert {name: test.baseline for name, test in tests.items()} == {"a": "b", "b": "a", "c": "a", "bound": ""}
    assert tests["a"].difference == pytest.approx(0.1)
    assert tests["b"].difference == pytest.approx(-0.1)
    assert tests["a"].p == tests["b"].p == tests["a"].p_holm == pytest.approx(1 - 3**0.5 / 5**0.5)  # t = sqrt(3)
    assert math.isnan(tests["c"].p)  # 0.4 less with every seed
    assert math.isnan(tests["bound"].difference)


def test_a_named_baseline(tmp_path: Path) -> None:
    """Three tests against "z": p values of t = sqrt(3) twice and 2 sqrt(3), all of them corrected for three."""
    section = section_of(
        tmp_path, a=[0.5, 0.6, 0.7], b=[0.4, 0.5, 0.6], c=[0.5, 0.6, 0.7], z=[0.4] * 3, bound=[0.9] * 3
    )
    tests = against_baseline(section, "z")
    assert [test.baseline for test in tests.values()] == ["z", "z", "z", "", ""]
    low, high = 1 - 2 * 3**0.5 / 14**0.5, 1 - 3**0.5 / 5**0.5
    assert [tests[name].p for name in "abc"] == pytest.approx([low, high, low])
    assert [tests[name].p_holm for name in "abc"] == pytest.approx([3 * low, high, 3 * low])
    assert {test.baseline for test in against_baseline(section, "not here").values()} == {""}


def test_one_row_has_no_baseline(tmp_path: Path) -> None:
    assert against_baseline(section_of(tmp_path, a=[0.5, 0.6]))["a"].baseline == ""


def column(**changes: object) -> Column:
    return Column("key", "title", "cost", lambda run: 0.0, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shown", "values", "text"),
    [
        (column(scale=100), [0.5, 0.6], "55.0 ± 7.1"),
        (column(scale=100), [0.5], "50.0"),
        (column(scale=100), [0.5, NAN, 0.6], "55.0 ± 7.1 (2/3)"),
        (column(scale=100), [NAN, NAN], "–"),
        (column(digits=0, spread=False), [20.0, 22.0, NAN], "21 (2/3)"),
        (column(digits=0, spread=False, sum_up=True), [1.0, 2.0], "3"),
        (column(scale=1e-6), [1.2345e9, 1.2345e9], "1,234.5 ± 0.0"),
    ],
)
def test_show(shown: Column, values: list[float], text: str) -> None:
    assert show(shown, values) == text


def test_rounds_and_bytes_to_a_target(tmp_path: Path) -> None:
    """Evaluated in rounds 2 and 4 with 0.3 and 0.6; a megabyte a round. 0.3 is reached in 2, 0.6 in 4, 0.7 never."""
    run = read_run(make_run(tmp_path / "a", accuracy=[None, 0.3, None, 0.6]))
    assert run is not None
    assert [run.until(target) for target in (0.3, 0.6)] == [(2, 2e6), (4, 4e6)]
    assert all(map(math.isnan, run.until(0.7)))
    by_key = {each.key: each for each in columns([0.3])}
    assert by_key["rounds_to_0.3"].read(run) == 2
    assert by_key["bytes_up_to_0.3"].read(run) == 2e6
    assert by_key["accuracy_last"].read(run) == 0.6
    assert by_key["accuracy_mean_last_tenth"].read(run) == pytest.approx(0.45)
    assert by_key["bytes_up"].read(run) == 4e6
    assert math.isnan(by_key["pseudo_accuracy"].read(run))


def test_what_methods_report_has_its_column(tmp_path: Path) -> None:
    means = {
        "posterior/accuracy_nothing": "annotation_accuracy",
        "belief/converged": "belief_converged",
        "belief/bag_residual": "belief_bag_residual",
        "graph/homophily": "graph_homophily",
        "functions/classes": "function_classes",
        "functions/estimated_accuracy": "function_estimated_accuracy",
    }
    folder = make_run(tmp_path / "a")
    summary = json.loads((folder / "summary.json").read_text())
    for place, key in enumerate(means, start=1):
        summary[key] = {"last": 0.0, "best": 0.0, "mean_last_tenth": place / 8}
    (folder / "summary.json").write_text(json.dumps(summary))
    run = read_run(folder)
    assert run is not None
    by_key = {each.key: each for each in columns()}
    assert [by_key[key].read(run) for key in means.values()] == [place / 8 for place in range(1, 7)]


def test_odds() -> None:
    assert odds(0.75) == pytest.approx(3)
    assert odds(0.0) == 0
    assert math.isnan(odds(1.0))
    assert math.isnan(odds(NAN))
