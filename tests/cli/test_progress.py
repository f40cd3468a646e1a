import io
import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

import fedlabel
from fedlabel.cli.progress import duration, run_progress, sweep_progress
from fedlabel.config import load_config
from fedlabel.data.labels.label_card import LabelCard
from fedlabel.experiment import Experiment
from fedlabel.methods.fedlabel import FedLabel
from fedlabel.methods.recipe import Task
from fedlabel.study.sweep import Cell
from fedlabel.study.sweep_run import Event

TASK = Task(10, 10, LabelCard(100, 10, 0, 0, 0, 0, 0, 0, 0, ()))


def lines(overrides: list[str], metrics: list[dict[str, float]]) -> list[str]:
    """What a run that reports these metrics, one round each, prints where there is no terminal; without the seconds."""
    written = io.StringIO()
    small = ["num_clients=2", "data.train_samples=100", "model.name=mlp", "model.hidden_layers=[8]", "device=cpu"]
    experiment = Experiment(load_config(overrides=[f"num_rounds={len(metrics)}", *small, *overrides]))
    with run_progress(Console(file=written, width=200)) as (on_start, on_round):
        on_start(experiment)
        for number, logged in enumerate(metrics, start=1):
            on_round(number, {"system/failed_clients": 0.0, **logged})
    return [line.rsplit("  ", 1)[0] for line in written.getvalue().splitlines()]


def test_a_stage_is_named_where_it_begins_and_with_every_figure() -> None:
    dp_ssl = [
        "method.name=dp_ssl",
        "method.functions_rounds=3",
        "method.assignment_rounds=1",
        "method.label_model_rounds=1",
    ]
    written = lines(dp_ssl, [{}, {"interim/accuracy": 0.25}, {}, {}, {"eval/accuracy": 0.5}, {}])
    assert written == [
        "round 1/6  functions",
        "round 2/6  functions  interim accuracy 0.250",
        "round 4/6  label model  interim accuracy 0.250",
        "round 5/6  end model  accuracy 0.500",
    ]


def test_methods_of_one_stage_print_evaluations_and_failures_alone() -> None:
    written = lines(["method.name=supervised"], [{}, {"eval/accuracy": 0.5}, {"system/failed_clients": 2.0}])
    assert written == ["round 2/3  accuracy 0.500", "round 3/3  accuracy 0.500  FAILED CLIENTS 2"]


def test_a_search_that_was_done_and_lacks_its_metric_is_counted_once() -> None:
    written = io.StringIO()
    searched, final = (
        Cell(setting="all", method="m", key="", role=role, value=None, seed=0, path=role, config=None)
        for role in ("search", "final")
    )
    with sweep_progress(Console(file=written, width=200), 2) as report:
        report(Event("done", searched))
        report(Event("failed", searched, "no such metric"))
        report(Event("failed", final, "no run of its search was done"))
    assert [line.split(":")[0] for line in written.getvalue().splitlines()] == ["1/2 done", "1/2 failed", "2/2 failed"]


def test_durations() -> None:
    assert [duration(x) for x in (0.4, 59.6, 200, 7500, 180_000)] == [
        "0 s",
        "1 min 0 s",
        "3 min 20 s",
        "2 h 5 min",
        "2 d 2 h",
    ]


def test_time_left_is_that_of_the_rounds_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round 7 of 10 is the first of a resumed run: 20 s for it, 60 s for the three that are left."""
    now = 100.0
    monkeypatch.setattr("fedlabel.cli.progress.time", SimpleNamespace(monotonic=lambda: now))
    written = io.StringIO()
    experiment = SimpleNamespace(config=load_config(overrides=["num_rounds=10"]), recipe=FedLabel().recipe(TASK))
    with run_progress(Console(file=written, width=200)) as (on_start, on_round):
        on_start(experiment)  # type: ignore[arg-type]
        for number, seconds in ((7, 20.0), (8, 20.0), (9, 50.0), (10, 10.0)):
            now += seconds
            on_round(number, {"system/failed_clients": 0.0, "eval/accuracy": 0.5})
    found = [line.rsplit("  ", 1)[1] for line in written.getvalue().splitlines()]
    assert found == ["20 s, 1 min 0 s left", "40 s, 40 s left", "1 min 30 s, 30 s left", "1 min 40 s"]


def test_the_bar_fits_a_terminal_of_80_columns() -> None:
    """The longest line that is usual, on a terminal; elsewhere there are no control characters at all."""
    written = {
        terminal: Console(file=io.StringIO(), width=80, force_terminal=terminal, legacy_windows=False)
        for terminal in (True, False)
    }
    experiment = SimpleNamespace(config=load_config(overrides=["num_rounds=200"]), recipe=FedLabel().recipe(TASK))
    for console in written.values():
        with run_progress(console) as (on_start, on_round):
            on_start(experiment)  # type: ignore[arg-type]
            on_round(1, {"system/failed_clients": 0.0, "eval/accuracy": 0.5, "pseudo/coverage": 0.25})
    bar, lines = (re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue()) for console in written.values())  # type: ignore[attr-defined]
    assert "1/200" in bar
    assert "accuracy 0.500  coverage 0.250" in bar
    assert " left" in bar.replace("\r", "\n")
    assert lines.count("\n") == 1
    assert not {"\x1b", "\r"} & {*written[False].file.getvalue()}  # type: ignore[attr-defined]


@pytest.mark.skipif(find_spec("ipywidgets") is not None, reason="ipywidgets is there: a bar is shown")
def test_a_notebook_without_widgets_gets_no_bar_and_no_warning() -> None:
    """rich would warn, which is an error here, and show nothing."""
    small = ["num_rounds=2", "num_clients=2", "data.train_samples=100", "model.name=mlp", "device=cpu"]
    with run_progress(Console(force_jupyter=True)) as (on_start, on_round):
        on_start(Experiment(load_config(overrides=small)))
        on_round(1, {"system/failed_clients": 0.0, "eval/accuracy": 0.5})


def test_a_run_from_python_shows_its_progress_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[int] = []
    settings = {"num_clients": 2, "data": {"train_samples": 100}, "model": {"name": "mlp", "hidden_layers": [8]}}
    for progress in (False, True):
        fedlabel.run(
            num_rounds=2,
            device="cpu",
            progress=progress,
            on_round=lambda row: seen.append(row["round"]),
            name=str(progress),
            out=tmp_path,
            **settings,  # type: ignore[arg-type]
        )
        printed = capsys.readouterr().out
        assert printed.count("round 2/2") == int(progress)
    assert seen == [1, 2, 1, 2]
