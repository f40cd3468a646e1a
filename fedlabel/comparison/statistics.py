"""What is said of a row: means over seeds, paired tests against a baseline, and the columns of the tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.stats import ttest_rel

from fedlabel.comparison.runs import ACCURACY, COLUMN, Run, Section


@dataclass(frozen=True)
class Stat:
    """A number over the seeds of a row."""

    mean: float
    """Over the seeds that have it; NaN if none has."""
    sd: float
    """Sample standard deviation (n - 1); NaN with fewer than two."""
    count: int
    """Seeds that have it."""
    total: int
    """Seeds."""


def over_seeds(values: Sequence[float]) -> Stat:
    """Returns mean and sample standard deviation of the finite values: 1, 3 and NaN give 2 ± sqrt(2), 2 of 3."""
    finite = np.array([value for value in values if math.isfinite(value)])
    mean = float(finite.mean()) if len(finite) else math.nan
    return Stat(mean, float(finite.std(ddof=1)) if len(finite) > 1 else math.nan, len(finite), len(values))


def odds(share: float) -> float:
    """Returns right / wrong from the share that is right: .75 gives 3; NaN where nothing is wrong."""
    return share / (1 - share) if share < 1 else math.nan


class PairedTest(NamedTuple):
    """A row against its baseline."""

    baseline: str
    """Row name; "" if there is none."""
    difference: float
    """Mean over the common seeds of the row's minus the baseline's accuracy, or what else rows are tested by (mean of
    the last 10); NaN without one."""
    p: float
    """Of the paired two-sided t test; NaN with fewer than two common seeds or without a variance."""
    p_holm: float
    """Corrected for all tests of the section."""


def paired_test(ours: Mapping[int, float], theirs: Mapping[int, float]) -> tuple[float, float]:
    """Returns mean difference and two-sided p of the paired t test over common seeds; NaN where there is none.

    0.5, 0.6 and 0.7 against 0.4, 0.4 and 0.4: differences 0.1, 0.2, 0.3 of mean 0.2 and sd 0.1, so
    t = 0.2 / (0.1 / sqrt(3)) = 3.46 with 2 degrees of freedom, p = 0.0742.

    Args:
        ours: seed -> accuracy.
        theirs: the same of the baseline.
    """
    seeds = sorted(set(ours) & set(theirs))
    differences = np.array([ours[seed] - theirs[seed] for seed in seeds])
    if not len(seeds):
        return math.nan, math.nan
    if len(seeds) < 2 or differences.std(ddof=1) < 1e-12:
        return float(differences.mean()), math.nan
    result = ttest_rel([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
    return float(differences.mean()), float(result.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p values corrected for their number by Holm's step-down procedure; NaN stays and does not count.

    Of m values in rising order the i-th is multiplied by m + 1 - i, and none may fall below the one before:
    (0.01, 0.04, 0.03) gives (0.03, 0.06, 0.06).
    """
    order = sorted((p, place) for place, p in enumerate(p_values) if math.isfinite(p))
    corrected = [math.nan] * len(p_values)
    highest = 0.0
    for rank, (p, place) in enumerate(order):
        highest = max(highest, min(1.0, p * (len(order) - rank)))
        corrected[place] = highest
    return corrected


def against_baseline(
    section: Section, baseline: str | None = None, metric: str = ACCURACY, column: str = COLUMN
) -> dict[str, PairedTest]:
    """Returns every row's test against its baseline.

    Args:
        section: the rows.
        baseline: the row that all are tested against (none is, where the section lacks it); None: for each row the
            best of the others. Upper bounds, which see every label, are neither tested nor a baseline unless named.
        metric: of summary.json; high is good.
        column: of the metric.
    """
    scores = {name: {run.config.seed: run.value(metric, column) for run in runs} for name, runs in section.items()}
    contestants = [name for name, runs in section.items() if not runs[0].config.method.oracle_labels]
    tests: dict[str, PairedTest] = {}
    for name in section:
        others = [other for other in contestants if other != name]
        best = max(others, key=lambda other: float(np.mean(list(scores[other].values()))), default="")
        against = best if baseline is None else baseline
        if name not in contestants or against == name or against not in section:
            tests[name] = PairedTest("", math.nan, math.nan, math.nan)
        else:
            tests[name] = PairedTest(against, *paired_test(scores[name], scores[against]), math.nan)
    # The best row against the second, and the second against the best, are one test.
    pairs = {frozenset((name, test.baseline)): test.p for name, test in tests.items()}
    corrected = dict(zip(pairs, holm(list(pairs.values())), strict=True))
    return {name: test._replace(p_holm=corrected[frozenset((name, test.baseline))]) for name, test in tests.items()}


@dataclass(frozen=True)
class Column:
    """A number of every run, and how tables show it."""

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
    """Returns all columns, in the tables' order; means of the last tenth of the rounds where not said otherwise."""

    def percent(key: str, title: str, table: str, metric: str, column: str = COLUMN) -> Column:
        return Column(key, title, table, lambda run: run.value(metric, column), scale=100)

    def until(target: float, place: int) -> Callable[[Run], float]:
        return lambda run: run.until(target)[place]

    def mean(key: str, title: str, metric: str, scale: float, digits: int) -> Column:
        return Column(key, title, "cost", lambda run: run.value(metric), scale, digits, spread=False)

    to_target = []
    for target in targets:
        name, shown = f"{target:g}", f"{100 * target:g} %"
        to_target += [
            Column(f"rounds_to_{name}", f"rounds to {shown}", "cost", until(target, 0), digits=0, spread=False),
            Column(f"bytes_up_to_{name}", f"MB up to {shown}", "cost", until(target, 1), 1e-6, spread=False),
        ]
    return [
        percent("accuracy_last", "last", "accuracy", ACCURACY, "last"),
        percent("accuracy_mean_last_tenth", "mean of last tenth", "accuracy", ACCURACY),
        percent("accuracy_best", "best", "accuracy", ACCURACY, "best"),
        percent("accuracy_selected", "selected", "accuracy", ACCURACY, "selected"),
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
        percent("belief_converged", "converged", "beliefs", "belief/converged"),
        Column("belief_bag_residual", "missed", "beliefs", lambda run: run.value("belief/bag_residual"), digits=2),
        percent("graph_homophily", "homophily", "beliefs", "graph/homophily"),
        Column("function_classes", "classes", "functions", lambda run: run.value("functions/classes")),
        percent("function_coverage", "coverage", "functions", "functions/coverage"),
        percent("function_overlap", "overlap", "functions", "functions/overlap"),
        percent("function_conflict", "conflict", "functions", "functions/conflict"),
        percent("function_accuracy", "right", "functions", "functions/accuracy"),
        percent("function_estimated_accuracy", "estimate", "functions", "functions/estimated_accuracy"),
        percent("function_estimation_error", "estimate's error", "functions", "functions/estimation_error"),
        percent("majority_accuracy", "by majority", "functions", "functions/majority_accuracy"),
        percent("normalized_vote_accuracy", "by share of votes", "functions", "functions/normalized_vote_accuracy"),
        *to_target,
        mean("bytes_up", "MB up", "comm/bytes_up", 1e-6, 1),
        mean("bytes_down", "MB down", "comm/bytes_down", 1e-6, 1),
        mean("claimed_bytes_up", "MB up, claimed", "comm/claimed_bytes_up", 1e-6, 1),
        mean("claimed_bytes_down", "MB down, claimed", "comm/claimed_bytes_down", 1e-6, 1),
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
