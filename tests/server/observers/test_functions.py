"""Labelling functions under watch: what is counted of votes, the table and the figure, and whole runs of DP-SSL."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import fedlabel
from fedlabel.data.labels.labeling_functions import FunctionReport
from fedlabel.experiment import open_experiment
from fedlabel.inference.head_assignment import votes_of
from fedlabel.learning.metrics import Counts, add_counts, function_counts
from fedlabel.learning.step import frozen_model
from fedlabel.methods.batch import State
from fedlabel.record import figures
from fedlabel.record.event_file import EventFile
from fedlabel.record.figures import functions_figure
from fedlabel.record.json_files import read_metrics
from server.checkpoint import load_checkpoint
from server.observers import Report, Round
from server.observers.functions import FunctionObserver, markdown
from server.simulation import simulate
from server.state import ServerState
from tests.integration.tiny import assert_same_run, final_weights

NAMES = ("cat", "dog", "cow")
SETS = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 1, 1]]).bool()
VOTES = torch.tensor([[0, 1, -1], [1, 1, -1], [-1, -1, -1], [0, -1, -1], [1, 2, 2], [0, 1, 1]])
TRUTH = torch.tensor([0, 1, 2, 1, -1, 0])
"""Two against one in the last row, a tie in the first; of the fifth sample nobody knows the class."""


# --------------------------------------------------------------------------------------------------------------- counts


def test_counts_by_hand() -> None:
    """Majority: cat or dog (1/2 right), dog, any (no vote, 1/3 right), cat, -, dog: 1 + 5/6 are right. Of one function
    for cats, three for dogs: in the first and the last row 1 / 1 against 1 / 3 and 2 / 3, so cat: 3 + 1/3 are right."""
    counts = function_counts(VOTES, SETS, TRUTH)
    assert np.reshape(counts["function_votes"], (3, 3)).tolist() == [[3, 2, 0], [0, 3, 1], [0, 1, 1]]
    overlap, conflict, right, known = np.reshape(counts["function_counts"], (3, 4)).T.tolist()
    assert overlap == [4, 4, 2]
    assert conflict == [3, 3, 2]
    assert right == [3, 1, 0]
    assert known == [4, 3, 1]
    assert counts["function_samples"] == pytest.approx([6, 5, 5, 11 / 6, 10 / 3])


def test_who_agrees_does_not_conflict() -> None:
    """Three say dog, and then a fourth something else, which is against all of them and they against it."""
    sets, truth = torch.ones(4, 3).bool(), torch.tensor([1])
    for votes, conflict in (([1, 1, 1, -1], [0, 0, 0, 0]), ([1, 1, 1, 2], [1, 1, 1, 1])):
        counts = function_counts(torch.tensor([votes]), sets, truth)
        assert np.reshape(counts["function_counts"], (4, 4))[:, 1].tolist() == conflict


def test_counts_of_clients_add_up() -> None:
    parts = [function_counts(VOTES[rows], SETS, TRUTH[rows]) for rows in torch.arange(6).split([1, 5])]
    parts.append(function_counts(VOTES[:0], SETS, TRUTH[:0]))
    assert add_counts(parts) == function_counts(VOTES, SETS, TRUTH)


# ---------------------------------------------------------------------------------------------------------------- watch


class Watch:
    """An observer of a method that shares its estimates as they are, and what it reported, by round."""

    def __init__(self, rounds: int = 5, functions: Sequence[FunctionReport] = (), figures: bool = True) -> None:
        experiment: Any = SimpleNamespace(
            config=SimpleNamespace(num_rounds=rounds, supervision=SimpleNamespace(parts=[]), draws_figures=figures),
            recipe=SimpleNamespace(
                inspect=lambda shared: {"function_accuracy": shared["estimates"]} if "estimates" in shared else {}
            ),
            federation=SimpleNamespace(
                dataset=SimpleNamespace(class_names=NAMES), functions=functions, function_names=()
            ),
        )
        self.observer = FunctionObserver(experiment)
        self.reports: dict[int, Report] = {}

    def watch(self, number: int, clients: Mapping[int, Counts], shared: State) -> dict[str, float]:
        """Lets it see the counts that clients sent in a round; returns its metrics."""
        tally: Any = SimpleNamespace(client_counts=clients)
        state = ServerState(number, {}, "", shared=shared)
        self.reports[number] = self.observer.after_round(Round(number, tally, None, 0.0, False), state)
        return self.reports[number].metrics

    def rows(self) -> dict[str, list[dict[str, str]]]:
        """Client -> its rows of the last table."""
        found: dict[str, list[dict[str, str]]] = {}
        (text,) = (report.files["labeling_functions.csv"] for report in [self.reports[max(self.reports)]])
        for row in csv.DictReader(text.splitlines()):
            found.setdefault(row.pop("client"), []).append(row)
        return found

    def texts(self, tag: str) -> dict[int, str]:
        """Round -> the text that is shown."""
        return {number: report.texts[tag] for number, report in self.reports.items() if tag in report.texts}


def counts_of(rows: slice) -> Counts:
    return {**function_counts(VOTES[rows], SETS, TRUTH[rows]), "drawn": [7.0]}


ESTIMATES = {"estimates": torch.tensor([0.5, 0.5, 0.25])}


def test_metrics_are_means_over_functions() -> None:
    """Of six samples: coverage (5, 4, 2) / 6, right (3/4, 1/3, 0/1), the estimates off by (1/4, 1/6, 1/4)."""
    watch = Watch()
    clients = {0: counts_of(slice(0, 2)), 1: counts_of(slice(2, 6))}
    metrics = watch.watch(1, clients, ESTIMATES)
    assert metrics == pytest.approx(
        {
            "functions/coverage": 11 / 18,
            "functions/overlap": 10 / 18,
            "functions/conflict": 8 / 18,
            "functions/accuracy": (3 / 4 + 1 / 3) / 3,
            "functions/classes": 2.0,
            "functions/estimated_accuracy": (1 / 2 + 1 / 2 + 1 / 4) / 3,
            "functions/estimation_error": (1 / 4 + 1 / 6 + 1 / 4) / 3,
            "functions/voted": 5 / 6,
            "functions/majority_accuracy": 11 / 30,
            "functions/normalized_vote_accuracy": 2 / 3,
        }
    )


def test_table_has_a_row_of_each_function_over_all_and_at_each_client() -> None:
    watch = Watch()
    clients = {1: counts_of(slice(2, 6)), 0: counts_of(slice(0, 2))}
    watch.watch(1, clients, ESTIMATES)
    rows = watch.rows()
    assert list(rows) == ["all", "0", "1"]
    assert [row["function"] for row in rows["all"]] == ["0", "1", "2"]
    assert rows["all"][0] == {
        "function": "0",
        "polarity": "cat, dog",
        "coverage": "0.833333",
        "overlap": "0.666667",
        "conflict": "0.500000",
        "accuracy": "0.750000",
        "estimated_accuracy": "0.500000",
        "votes": "5",
        "abstentions": "1",
        "samples": "6",
    }
    assert [row["polarity"] for row in rows["all"]] == ["cat, dog", "dog, cow", "dog, cow"]
    assert [row["coverage"] for row in rows["0"]] == ["1.000000", "1.000000", "0.000000"]
    assert [row["accuracy"] for row in rows["0"]] == ["1.000000", "0.500000", ""]  # the third said nothing there
    assert rows["0"][2]["polarity"] == ""
    assert [row["samples"] for row in rows["1"]] == ["4"] * 3


def test_a_client_that_is_not_drawn_stays_and_one_that_is_drawn_again_is_new() -> None:
    watch = Watch()
    first, second = counts_of(slice(0, 2)), counts_of(slice(2, 6))
    watch.watch(1, {0: first, 1: second, 2: {"drawn": [3.0]}}, {})
    assert list(watch.rows()) == ["all", "0", "1"]
    assert {row["estimated_accuracy"] for rows in watch.rows().values() for row in rows} == {""}
    before = watch.rows()
    again = counts_of(slice(4, 5))
    metrics = watch.watch(2, {1: again}, ESTIMATES)
    after = watch.rows()
    unestimated = [{**row, "estimated_accuracy": ""} for row in after["0"]]
    assert unestimated == before["0"]
    assert [row["samples"] for row in after["1"]] == ["1"] * 3
    assert [row["samples"] for row in after["all"]] == ["3"] * 3
    assert [row["estimated_accuracy"] for row in after["all"]] == ["0.500000", "0.500000", "0.250000"]
    assert [row["estimated_accuracy"] for row in after["1"]] == ["", "", ""]  # the estimate is not a client's
    assert metrics["functions/coverage"] == pytest.approx(
        np.mean([float(row["coverage"]) for row in after["all"]]), abs=1e-6
    )  # of both clients, as in the table
    assert metrics["functions/coverage"] != 1  # that of the client that was drawn
    restored = Watch()
    restored.observer.load(watch.observer.dump())
    assert restored.watch(3, {1: again}, ESTIMATES) == metrics
    assert restored.rows() == after


def test_table_and_figure_are_shown_with_the_first_estimate_and_at_the_end() -> None:
    watch = Watch()
    counts = counts_of(slice(0, 6))
    for round_number, shared in ((2, {}), (3, ESTIMATES), (4, ESTIMATES), (5, ESTIMATES)):
        watch.watch(round_number, {0: counts}, shared)
    assert list(watch.texts("functions")) == [3, 5]
    assert [number for number, report in watch.reports.items() if report.figures] == [3, 5]
    assert {tag for report in watch.reports.values() for tag in report.figures} == {"functions"}
    lines = watch.texts("functions")[3].splitlines()
    assert lines[0].startswith("| function | polarity | coverage |")
    assert lines[2] == "| 0 | cat, dog | 0.833 | 0.667 | 0.500 | 0.750 | 0.500 | 5 | 1 | 6 |"
    assert len(lines) == 5
    assert list(watch.texts("functions/clients")) == [3, 5]
    head, _, row = watch.texts("functions/clients")[3].splitlines()
    assert head.startswith(
        "| client | samples | coverage | overlap | conflict | accuracy | voted | majority_accuracy |"
    )
    assert row == "| 0 | 6 | 0.611 | 0.556 | 0.444 | 0.361 | 0.833 | 0.367 | 0.667 |"


def test_a_round_without_an_unlabelled_sample_is_shown_as_nothing() -> None:
    watch = Watch(rounds=1)
    nobody = counts_of(slice(0, 0))
    assert watch.watch(1, {0: nobody}, ESTIMATES) == {}
    assert watch.rows()["all"][0]["coverage"] == ""
    assert len(watch.reports[1].figures) == 1


def test_markdown_leaves_out_what_is_not_known() -> None:
    table = markdown([{"name": "a", "rate": 0.12345, "count": 3}, {"name": "b", "rate": float("nan"), "count": 0}])
    assert table == "| name | rate | count |\n|---|---|---|\n| a | 0.123 | 3 |\n| b |  | 0 |"


def test_figure_has_a_point_for_each_function_that_is_known_and_estimated() -> None:
    nan = float("nan")
    figure = functions_figure(np.array([0.5, 0.1, 0.9]), np.array([0.8, nan, 0.4]), np.array([0.7, 0.5, 0.6]))
    (points,) = figure.axes[0].collections
    assert np.allclose(points.get_offsets(), [[70, 80], [60, 40]])
    assert np.allclose(np.asarray(points.get_array()), [50, 90])
    assert figure.axes[0].get_title() == "3 labelling functions"
    functions_figure(*[np.array([nan])] * 3)


# ----------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than these runs."""
    monkeypatch.setattr(figures, "save_png", lambda figure, path: None)
    monkeypatch.setattr(EventFile, "add_figure", lambda self, tag, figure, step: None)


COMMON = (
    *("num_clients=3", "fraction_train=1", "partition.kind=iid", "model.name=mlp", "training.local_steps=15"),
    *("evaluation.panel_samples=0", "device=cpu", "method.name=dp_ssl", "training.batch_size=16"),
)
GROWN = (
    *COMMON,
    *("supervision.label_rate=0.2", "num_rounds=9", "method.num_functions=10", "method.functions_rounds=5"),
    *("method.assignment_rounds=2", "method.label_model_rounds=2", "method.averaging_decay=0.3"),
    *("method.confidence_threshold=0.9", "training.lr=0.1", "training.local_steps=40"),
    *("evaluation.every=3", "checkpoint.keep=20"),
)


@pytest.mark.slow
@pytest.mark.usefixtures("no_figures")
def test_functions_grow_are_judged_and_teach_and_a_stopped_run_goes_on_to_the_same(tmp_path: Path) -> None:
    """Stopped at the end of the functions' stage: what the clients' votes come from is their moving average.

    Measured: posteriors .79, the majority .70, the end model .84; what the functions say after three rounds .68.
    """
    whole = fedlabel.run([], GROWN, name="whole", out=tmp_path)

    def stop(done: int, metrics: Mapping[str, float]) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate([], GROWN, name="x", out=tmp_path, on_round=stop)
    resumed = fedlabel.run(name="x", out=tmp_path, resume=True)
    assert_same_run(resumed.path, whole.path)
    assert (resumed.path / "labeling_functions.csv").read_bytes() == (
        whole.path / "labeling_functions.csv"
    ).read_bytes()

    states = [load_checkpoint(path) for path in sorted((whole.path / "checkpoints").glob("round_*.ckpt"))]
    assert states[0].average == {}  # nothing was trained in the first round
    assert states[1].average.keys() == states[1].model.keys()
    assert all(torch.equal(states[1].model[name], value) for name, value in states[1].average.items())
    for before, after in pairwise(states[1:5]):
        for name, value in after.average.items():
            expected = 0.3 * before.average[name] + 0.7 * after.model[name]
            torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)
    for later in states[5:]:
        assert later.average == {}
        assert all(torch.equal(value, states[4].average[name]) for name, value in later.previous.items())
    heads = "heads.weight"
    assert all(torch.equal(later.model[heads], states[5].model[heads]) for later in states[6:])
    assert torch.equal(states[6].model["net.output.weight"], states[5].model["net.output.weight"])
    assert not torch.equal(states[7].model["net.output.weight"], states[6].model["net.output.weight"])
    assert [bool(torch.equal(states[i].shared["sets"], states[1].shared["sets"])) for i in range(2, 9)] == [True] * 7
    assert [float(state.shared["fitted"]) for state in states] == [0, 0, 0, 0, 0, 1, 2, 2, 2]

    experiment = open_experiment((whole.path / "config.yaml").read_text())
    split = experiment.evaluates_on.split
    voters = frozen_model(experiment.teacher, states[4].average)
    sets = states[4].shared["sets"] > 0.5
    silent = votes_of(voters(experiment.transform.normalize(split.images), "heads"), sets) < 0
    inside = sets.T[split.labels]
    rates = [[float(silent[where[:, head], head].double().mean()) for where in (inside, ~inside)] for head in range(10)]
    assert sum(outside > own + 0.1 for own, outside in rates) >= 9  # check 8

    rows = read_metrics(whole.path)
    votes = [row for row in rows if "functions/coverage" in row]
    assert [row["round"] for row in votes] == [6, 7, 8, 9]
    names = "coverage overlap conflict accuracy estimation_error voted majority_accuracy normalized_vote_accuracy"
    assert {f"functions/{name}" for name in names.split()} <= set(votes[0])
    assert [row["round"] for row in rows if "functions/kept" in row] == [2, 3, 4, 5]
    assert rows[0]["train/backward_samples"] == rows[5]["train/backward_samples"] == 0
    assert rows[-1]["pseudo/accuracy"] > rows[-1]["functions/majority_accuracy"] + 0.03
    evaluated = {row["round"]: row["eval/accuracy"] for row in rows if "eval/accuracy" in row}
    before = {row["round"]: row["interim/accuracy"] for row in rows if "interim/accuracy" in row}
    assert (list(before), list(evaluated)) == (
        [3, 5, 6, 7],
        [8, 9],
    )  # every third, and the last five; then the end model
    assert min(before.values()) > 0.5
    assert evaluated[9] > 0.7
    assert json.loads((whole.path / "summary.json").read_text())["rounds"] == 9
    with (whole.path / "labeling_functions.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["client"] for row in table[::10]] == ["all", "0", "1", "2"]
    assert len(table) == 40
    mean = np.mean([float(row["accuracy"]) for row in table[:10] if row["accuracy"]])
    assert rows[-1]["functions/accuracy"] == pytest.approx(mean, abs=1e-5)


def test_what_came_of_asking_written_functions_is_in_the_rows_over_all_clients() -> None:
    failing = FunctionReport("a", asked=6, votes=5, failed=1, first_failure="first on sample 3: KeyError", seconds=0.03)
    watch = Watch(functions=[failing, *[FunctionReport(name, asked=6) for name in "bc"]])
    watch.watch(1, {0: counts_of(slice(0, 6))}, ESTIMATES)
    rows = watch.rows()
    assert [row["failed"] for row in rows["all"]] == ["1", "0", "0"]
    assert rows["all"][0]["first_failure"] == "first on sample 3: KeyError"
    assert rows["all"][0]["seconds_per_1000"] == "5.000000"
    assert {row["failed"] for row in rows["0"]} == {""}


RULES = """
import numpy as np

def large(row):
    return "malignant" if row["worst radius"] > 18 else None

def small(row):
    return "benign" if row["worst radius"] < 15 else None

def smooth(row):
    return "benign" if row["worst concave points"] < 0.12 else None

def dented(row):
    return 0 if row["worst concave points"] > 0.16 else -1

def coarse(row):
    return int(row["mean texture"] < 20)
"""


@pytest.mark.usefixtures("no_figures")
def test_written_functions_teach_a_table_without_any_label(tmp_path: Path) -> None:
    (tmp_path / "rules.py").write_text(RULES)
    overrides = [*COMMON, "data.name=breast_cancer", "num_rounds=5", "method.functions=written"]
    overrides += ["method.num_functions=5", "method.label_model_rounds=3", "supervision.kind=labeling_functions"]
    path = fedlabel.run([], [*overrides, f"supervision.module={tmp_path / 'rules.py'}"], name="a", out=tmp_path).path
    rows = read_metrics(path)
    assert all("functions/accuracy" in row for row in rows)
    assert rows[-1]["pseudo/accuracy"] > 0.85
    assert rows[-1]["eval/accuracy"] > 0.85
    first, later = (load_checkpoint(path / "checkpoints" / f"round_{i:06d}.ckpt").model for i in (4, 5))
    assert first.keys() == later.keys() == final_weights(path).keys()
    assert not any(name.startswith("heads.") for name in later)
    with (path / "labeling_functions.csv").open() as file:
        table = {row["function"]: row for row in csv.DictReader(file) if row["client"] == "all"}
    assert {name: row["polarity"] for name, row in table.items()} == {
        "large": "malignant",
        "small": "benign",
        "smooth": "benign",
        "dented": "malignant",
        "coarse": "malignant, benign",
    }
    for row in table.values():
        assert (row["failed"], row["first_failure"], row["invalid"]) == ("0", "", "0")
        assert 0 < float(row["seconds_per_1000"]) < 10
        assert abs(float(row["accuracy"]) - float(row["estimated_accuracy"])) < 0.15
    audit = json.loads((path / "supervision.json").read_text())
    assert "votes" in json.dumps(audit)
    assert "functions/log_likelihood" not in rows[0]  # nothing is fitted yet
    assert all("functions/log_likelihood" in row for row in rows[1:3])

    (tmp_path / "rules.py").write_text(RULES.replace("> 18", "> 17"))
    with pytest.raises(
        ValueError,
        match=r"The data are not what they were .*; changed: partition and supervision \(.* labelling functions",
    ):
        fedlabel.run([], ["num_rounds=6"], name="a", out=tmp_path, resume=True)
    assert len(read_metrics(path)) == 5
    (tmp_path / "rules.py").write_text(RULES)
    fedlabel.run([], ["num_rounds=6"], name="a", out=tmp_path, resume=True)
    assert len(read_metrics(path)) == 6
