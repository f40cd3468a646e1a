import io

from rich.console import Console

from fedlabel.cli.progress import duration, run_progress, sweep_progress
from fedlabel.config import load_config
from fedlabel.experiment import Experiment
from fedlabel.study.sweep import Cell
from fedlabel.study.sweep_run import Event


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
