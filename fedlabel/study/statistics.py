"""Statistics of a row: means over seeds, paired tests against a baseline, and the columns of the tables."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student_t

from fedlabel.study.runs import ACCURACY, COLUMN, VIRTUAL, Run, Section


@dataclass(frozen=True)
class Stat:
    """Statistics of a value over the seeds of a row."""

    mean: float
    """Over the seeds that have it; NaN if none has."""
    sd: float
    """Sample standard deviation (n - 1); NaN with fewer than two."""
    count: int
    """Number of seeds that have it."""
    total: int
    """Number of seeds."""


def over_seeds(values: Sequence[float]) -> Stat:
    """Returns mean and sample standard deviation of the finite values: 1, 3 and NaN give 2 ± sqrt(2), 2 of 3."""
    finite = np.array([value for value in values if math.isfinite(value)])
    mean = float(finite.mean()) if len(finite) else math.nan
    return Stat(mean, float(finite.std(ddof=1)) if len(finite) > 1 else math.nan, len(finite), len(values))


def odds(share: float) -> float:
    """Returns the odds right / wrong from the share that is right: .75 gives 3; NaN if nothing is wrong."""
    return share / (1 - share) if share < 1 else math.nan


class PairedTest(NamedTuple):
    """A paired test of a row against another one."""

    against: str
    """The other row; "" if there is none."""
    difference: float
    """Mean over the common seeds of the row's minus the other's score, by default accuracy; NaN without one."""
    p: float
    """p of the paired two-sided t test; NaN with fewer than two common seeds or without a variance."""
    p_holm: float
    """p corrected for all tests of the section."""


NOT_TESTED = PairedTest("", math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class SectionTests:
    """The tests of a section, with the family-wise error controlled over all of them."""

    baseline: str
    """The row that all others were tested against; "": every row was tested against every other one."""
    rows: Mapping[str, PairedTest]
    """Row -> its test against the baseline; of all pairs, that against the best of the others."""
    pairs: Mapping[tuple[str, str], PairedTest]
    """(row, the other) -> their test; of all pairs both ways."""


class Tested(NamedTuple):
    """Paired tests of scores, each (..., pairs)."""

    difference: np.ndarray
    p: np.ndarray
    p_holm: np.ndarray


def paired_tests(scores: np.ndarray, pairs: Sequence[tuple[int, int]]) -> Tested:
    """Returns two-sided paired t tests over the seeds that both rows have, corrected by `holm` for their number.

    0.5, 0.6 and 0.7 against 0.4, 0.4 and 0.4: differences 0.1, 0.2, 0.3 of mean 0.2 and sd 0.1, so
    t = 0.2 / (0.1 / sqrt(3)) = 3.46 with 2 degrees of freedom, p = 0.0742.

    Args:
        scores: (..., rows, seeds); NaN where a row lacks a seed. What is in front are sections, tested apart.
        pairs: places of a row and of the other that it is tested against.
    """
    first, second = np.array(pairs, dtype=int).reshape(-1, 2).T
    differences = scores[..., first, :] - scores[..., second, :]
    common = np.isfinite(differences)
    count = common.sum(-1)
    mean = np.where(common, differences, 0).sum(-1) / np.where(count, count, np.nan)
    squares = (np.where(common, differences - mean[..., None], 0) ** 2).sum(-1)
    sd = np.sqrt(squares / np.where(count > 1, count - 1, np.nan))
    sd = np.where(sd < 1e-12, np.nan, sd)  # the same difference with every seed, up to rounding
    p = 2 * student_t.sf(np.abs(mean) / (sd / np.sqrt(count)), np.maximum(count - 1, 1))
    return Tested(mean, p, holm(p))


def holm(p_values: np.ndarray) -> np.ndarray:
    """Returns p values corrected for their number by Holm's step-down procedure; NaN stays and does not count.

    Of m values in rising order the i-th is multiplied by m + 1 - i, and none may fall below the one before:
    (0.01, 0.04, 0.03) gives (0.03, 0.06, 0.06). Whatever the tests have to do with each other, the probability of one
    or more p below a level, where no row differs, is at most the level (Holm, Scand. J. Statist. 6, 1979).

    Args:
        p_values: (..., tests); what is in front is corrected apart.
    """
    order = np.argsort(p_values, axis=-1)  # NaN last
    factor = np.isfinite(p_values).sum(-1, keepdims=True) - np.arange(p_values.shape[-1])
    raised = np.maximum.accumulate(np.take_along_axis(p_values, order, -1) * factor, axis=-1)
    corrected = np.empty_like(raised)
    np.put_along_axis(corrected, order, np.minimum(raised, 1.0), axis=-1)
    return corrected


def compare_rows(section: Section, baseline: str, metric: str = ACCURACY, column: str = COLUMN) -> SectionTests:
    """Returns the tests of a section.

    Args:
        section: the rows. Upper bounds, which see every label, are neither tested nor a baseline unless named.
        baseline: the row that all are tested against, named without a look at the results: the best row of the tested
            runs would differ from others too often where none does. "": all pairs are tested.
        metric: of summary.json; high is good.
        column: of the metric.
    """
    scores = {name: {run.config.seed: run.value(metric, column) for run in runs} for name, runs in section.items()}
    seeds = sorted({seed for values in scores.values() for seed in values})
    names = list(section)
    matrix = np.array([[scores[name].get(seed, math.nan) for seed in seeds] for name in names])
    contestants = [name for name, runs in section.items() if not runs[0].config.method.oracle_labels]
    if baseline:
        pairs = [(name, baseline) for name in contestants if name != baseline]
    else:
        pairs = list(itertools.combinations(contestants, 2))
    tested = paired_tests(matrix, [(names.index(name), names.index(other)) for name, other in pairs])
    found = {
        pair: PairedTest(pair[1], *map(float, values))
        for pair, values in zip(pairs, zip(*tested, strict=True), strict=True)
    }
    if baseline:
        rows = {name: found.get((name, baseline), NOT_TESTED) for name in names}
        return SectionTests(baseline, rows, found)
    both = found | {
        (other, name): test._replace(against=name, difference=-test.difference) for (name, other), test in found.items()
    }
    means = {name: float(np.mean(list(scores[name].values()))) for name in contestants}
    rows = {}
    for name in names:
        best = max((other for other in contestants if other != name), key=means.__getitem__, default="")
        rows[name] = both.get((name, best), NOT_TESTED)
    return SectionTests("", rows, both)


@dataclass(frozen=True)
class Column:
    """A value of every run, and its presentation in tables."""

    key: str
    """Name in the CSV files."""
    title: str
    table: str
    """accuracy | pseudo | beliefs | functions | clients | cost: the table it stands in."""
    read: Callable[[Run], float]
    """NaN where a run has none."""
    scale: float = 1.0
    """Factor for tables; CSV files have the number itself."""
    digits: int = 1
    spread: bool = True
    """Whether tables show the standard deviation."""
    sum_up: bool = False
    """Whether tables show the sum over seeds, not the mean."""


def columns(targets: Sequence[float] = ()) -> list[Column]:
    """Returns all columns, in the tables' order; means of the last tenth of the rounds unless stated otherwise."""

    def percent(key: str, title: str, table: str, metric: str, column: str = COLUMN) -> Column:
        return Column(key, title, table, lambda run: run.value(metric, column), scale=100)

    def until(target: float, against: str) -> Callable[[Run], float]:
        return lambda run: run.until(target, against)

    def mean(key: str, title: str, metric: str, scale: float, digits: int) -> Column:
        return Column(key, title, "cost", lambda run: run.value(metric), scale, digits, spread=False)

    to_target = []
    for target in targets:
        name, shown = f"{target:g}", f"{100 * target:g} %"
        to_target += [
            Column(f"rounds_to_{name}", f"rounds to {shown}", "cost", until(target, "round"), digits=0, spread=False),
            Column(f"bytes_up_to_{name}", f"MB up to {shown}", "cost", until(target, "bytes_up"), 1e-6, spread=False),
            Column(
                f"virtual_seconds_to_{name}",
                f"simulated s to {shown}",
                "cost",
                until(target, VIRTUAL),
                digits=0,
                spread=False,
            ),
        ]
    return [
        percent("accuracy_last", "last", "accuracy", ACCURACY, "last"),
        percent("accuracy_mean_last_tenth", "mean of last tenth", "accuracy", ACCURACY),
        percent("accuracy_best", "best", "accuracy", ACCURACY, "best"),
        percent("accuracy_selected", "selected", "accuracy", ACCURACY, "selected"),
        percent("rare_class_accuracy", "rare classes", "accuracy", "eval/rare_class_accuracy"),
        percent("balanced_accuracy", "balanced", "accuracy", "eval/balanced_accuracy"),
        percent("auc", "AUC", "accuracy", "eval/auc"),
        percent("auc_selected", "AUC, selected", "accuracy", "eval/auc", "selected"),
        percent("bag_mae", "bag error", "accuracy", "eval/bag_mae"),
        percent("ece", "ECE", "accuracy", "eval/ece"),
        percent("worst_client_accuracy", "worst client", "clients", "eval/worst_client_accuracy"),
        percent("worst_10pct_client_accuracy", "worst 10 %", "clients", "eval/worst_10pct_client_accuracy"),
        percent("client_accuracy_sd", "sd over clients", "clients", "eval/client_accuracy_sd"),
        Column("jain_index", "Jain index", "clients", lambda run: run.value("eval/jain_index"), digits=3),
        percent("pseudo_coverage", "coverage", "pseudo", "pseudo/coverage"),
        percent("pseudo_accuracy", "right", "pseudo", "pseudo/accuracy"),
        Column("pseudo_correct_wrong_ratio", "right / wrong", "pseudo", lambda r: odds(r.value("pseudo/accuracy"))),
        percent("annotation_accuracy", "right of all", "pseudo", "posterior/accuracy_nothing"),
        percent("pseudo_ece", "ECE of all", "pseudo", "pseudo/ece"),
        percent("pseudo_ece_kept", "ECE of kept", "pseudo", "pseudo/ece_kept"),
        Column("belief_converged", "converged", "beliefs", lambda run: run.mean("belief/converged"), scale=100),
        Column("belief_bag_residual", "missed", "beliefs", lambda run: run.mean("belief/bag_residual"), digits=2),
        Column("graph_homophily", "homophily", "beliefs", lambda run: run.mean("graph/homophily"), scale=100),
        Column("function_classes", "classes", "functions", lambda run: run.value("functions/classes", "last")),
        percent("function_coverage", "coverage", "functions", "functions/coverage", "last"),
        percent("function_overlap", "overlap", "functions", "functions/overlap", "last"),
        percent("function_conflict", "conflict", "functions", "functions/conflict", "last"),
        percent("function_accuracy", "right", "functions", "functions/accuracy", "last"),
        percent("function_estimated_accuracy", "estimate", "functions", "functions/estimated_accuracy", "last"),
        percent("function_estimation_error", "estimate's error", "functions", "functions/estimation_error", "last"),
        percent("majority_accuracy", "by majority", "functions", "functions/majority_accuracy", "last"),
        percent(
            "normalized_vote_accuracy", "by share of votes", "functions", "functions/normalized_vote_accuracy", "last"
        ),
        *to_target,
        mean("bytes_up", "MB up", "comm/bytes_up", 1e-6, 1),
        mean("bytes_down", "MB down", "comm/bytes_down", 1e-6, 1),
        mean("claimed_bytes_up", "MB up, claimed", "comm/claimed_bytes_up", 1e-6, 1),
        mean("claimed_bytes_down", "MB down, claimed", "comm/claimed_bytes_down", 1e-6, 1),
        Column("slow_half_share", "slow half", "cost", lambda run: run.mean("system/slow_half_share"), scale=100),
        Column("virtual_seconds", "simulated s", "cost", lambda run: run.simulated_seconds, digits=0),
        Column("seconds", "seconds", "cost", lambda run: run.value("seconds"), digits=0),
        mean("forward_samples", "forward (k)", "train/forward_samples", 1e-3, 0),
        mean("backward_samples", "backward (k)", "train/backward_samples", 1e-3, 0),
        Column(
            "failed_clients", "failed", "cost", lambda r: r.value("system/failed_clients"), 1, 0, False, sum_up=True
        ),
    ]


def show(column: Column, values: Sequence[float]) -> str:
    """Returns a cell of a table: "68.2 ± 0.8"; "21 (2/3)" where one of three seeds has none; "–" where all lack it.

    Args:
        column: what and how.
        values: one per seed.
    """
    stat = over_seeds(values)
    if not stat.count:
        return "–"
    mean = stat.mean * (stat.count if column.sum_up else 1)
    text = f"{column.scale * mean:,.{column.digits}f}"
    if column.spread and stat.count > 1:
        text += f" ± {column.scale * stat.sd:.{column.digits}f}"
    return text + (f" ({stat.count}/{stat.total})" if stat.count < stat.total else "")
