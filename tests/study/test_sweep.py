"""Sweeps: what is refused, what is run in which order, what is chosen, and what a second call does."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from fedlabel.cli.main import app
from fedlabel.config import ConfigError, ExperimentConfig, load_config, parse_config, to_yaml
from fedlabel.record.files import FolderLock
from fedlabel.record.json_files import read_metrics
from fedlabel.study.sweep import format_value, load_sweep, parse_sweep, plan_sweep
from fedlabel.study.sweep_run import Event, choose, finished_cells, run_sweep
from tests.integration.processes import environment, fedlabel_command, marked, start, stop_marked, wait_until
from tests.integration.tiny import TINY, assert_same_run

METHODS: dict[str, list[str]] = {"labelled only": ["method.name=supervised"], "FedLabel": []}
SEARCH = {"values": [0.2, 0.05], "seed": 7}
ALPHAS = {f"alpha {alpha}": [f"partition.dirichlet_alpha={alpha}"] for alpha in (0.1, 1)}
SHIPPED = sorted((Path(__file__).parents[2] / "configs" / "sweep").glob("*.yaml"))


def write(path: Path, **content: Any) -> Path:
    path.write_text(yaml.safe_dump({"methods": METHODS, **content}, sort_keys=False))
    return path


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["sweep", *map(str, arguments)], env={"COLUMNS": "200"})


def ledger(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "sweep.json").read_text())
    return found


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"method": {}}, ["`method` is no key of a sweep", "Did you mean methods?"]),
        ({"search": {"value": [1]}}, ["`search.value` is no key of a sweep", "Did you mean values?"]),
        ({"methods": {}}, ["`methods` must name at least one row"]),
        ({"methods": {"A": "method.name=supervised"}}, ["`methods.A`"]),
        ({"methods": {"A b": [], "a-B": []}}, ["`methods` has 'A b' and 'a-B'", "rename one"]),
        ({"methods": {"λ": []}}, ["`methods` has a name ('λ')"]),
        ({"seeds": [0, 0]}, ["`seeds` (=[0, 0])"]),
        ({"seeds": [0, "x"]}, ["`seeds` (=[0, x])", "whole numbers"]),
        ({"targets": [60]}, ["`targets` (=[60.0]) must lie in (0, 1)"]),
        ({"final_split": "train"}, ["`final_split` (=train)", "test, validation"]),
        ({"search": {"values": []}}, ["`search.values` (=[]) must be at least one number"]),
        ({"search": {"values": [1, 1]}}, ["`search.values` (=[1.0, 1.0])"]),
        ({"search": {"values": [1], "split": "test"}}, ["`search.split` (=test) must be validation"]),
        ({"search": {"values": [1], "column": "mean"}}, ["`search.column` (=mean)", "mean_last_tenth"]),
        (
            {"search": {"values": [1], "metric": "eval/acc"}},
            ["`search.metric` (=eval/acc)", "eval/accuracy", "eval/bag_mae"],
        ),
        ({"search": {"values": [1], "column": "mean_last_10"}}, ["`search.column` (=mean_last_10)"]),
        ({"compare": {"base": "FedLabel"}}, ["`compare.base` is no key of a sweep", "Did you mean baseline?"]),
        ({"compare": {"baseline": "FedLabl"}}, ["`compare.baseline` names 'FedLabl'", "Did you mean FedLabel?"]),
        (
            {"compare": {"baseline": "FedLabel", "all_pairs": True}},
            ["`compare.baseline` (=FedLabel) has no meaning with `compare.all_pairs` (=true)"],
        ),
        ({"compare": {"all_pairs": "perhaps"}}, ["`compare.all_pairs`", "perhaps"]),
        ({"search": {"values": [1], "seed": 2}}, ["`search.seed` (=2) must be none of `seeds`"]),
        (
            {"search": {"values": [1, 2], "per_method_values": {"FedLabel": [3]}}},
            ["`search.per_method_values.FedLabel` (=[3.0]) has 1 value, `search.values` 2", "same budget"],
        ),
        (
            {"search": {"values": [1], "per_method_values": {"FedLabl": [3]}}},
            ["`search.per_method_values` names 'FedLabl'", "Did you mean FedLabel?"],
        ),
        (
            {"settings": {"a": []}, "search": {"values": [1], "setting": "b"}},
            ["`search.setting` names 'b', which must be one of the settings: a"],
        ),
        ({"published": {"alpha 1": {}}}, ["`published` names 'alpha 1'", "all"]),
        ({"published": {"all": {"fedlabel": "46"}}}, ["`published.all` names 'fedlabel'", "Did you mean FedLabel?"]),
        ({"overrides": ["seed=3"]}, ["`overrides` sets seed=3", "use seeds"]),
        ({"settings": {"a": ["evaluation.split=test"]}}, ["`settings.a` sets evaluation.split=test", "final_split"]),
        (
            {"methods": {"A": ["training.lr=1"]}, "search": {"values": [1]}},
            ["`methods.A` sets training.lr=1", "search"],
        ),
    ],
)
def test_a_bad_sweep_is_one_message(content: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    result = call(write(tmp_path / "s.yaml", **content), "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert all(word in line for word in words), line
    assert str(tmp_path / "s.yaml") in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("methods: {", ["is not readable YAML"]),
        ("- a", ["must hold a mapping"]),
        (None, ["does not exist", "looked at"]),
    ],
)
def test_an_unreadable_sweep_is_named(text: str | None, words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    if text is not None:
        file.write_text(text)
    result = call(file)
    assert result.exit_code == 2
    assert all(word in result.stderr for word in [*words, str(file)]), result.stderr


def test_a_sweep_may_extend_another(tmp_path: Path) -> None:
    """Rows are merged, lists and numbers replaced; a row set to null is left out, in the order of the base."""
    write(tmp_path / "base.yaml", seeds=[0, 1], settings=ALPHAS, search=SEARCH, targets=[0.5])
    child = tmp_path / "child.yaml"
    rows = {"FedLabel": None, "UDA": ["method.name=uda"]}
    child.write_text(yaml.safe_dump({"extends": str(tmp_path / "base.yaml"), "methods": rows, "seeds": [3]}))
    sweep = load_sweep(child, ["num_rounds=2"])
    assert sweep.methods == {"labelled only": ["method.name=supervised"], "UDA": ["method.name=uda"]}
    assert sweep.seeds == [3]
    assert sweep.settings == ALPHAS
    assert sweep.targets == [0.5]
    assert sweep.overrides == ["num_rounds=2"]


def test_a_sweep_that_extends_itself_or_nothing_is_named(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(f"extends: {second}")
    second.write_text(f"extends: {first}")
    with pytest.raises(ConfigError, match=r"first.yaml extends itself, by way of .*second.yaml"):
        load_sweep(first)
    first.write_text("extends: nowhere.yaml")
    with pytest.raises(ConfigError, match=r"nowhere.yaml does not exist"):
        load_sweep(first)


def test_what_is_common_to_all_must_be_possible(tmp_path: Path) -> None:
    result = call(write(tmp_path / "s.yaml", overrides=["num_roundz=3"]), "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "`num_roundz` is not a configuration key. Did you mean" in result.stderr
    assert not (tmp_path / "out").exists()


def test_plan_is_every_method_in_every_setting() -> None:
    """2 settings x 2 methods; each searches 2 values at seed 7 on validation, then has 2 values x 3 seeds on test."""
    sweep = parse_sweep(
        {
            "overrides": ["num_rounds=9", "partition.dirichlet_alpha=5"],
            "methods": METHODS,
            "settings": ALPHAS,
            "search": {**SEARCH, "per_method_values": {"FedLabel": [3, 1e-05]}},
        }
    )
    groups = plan_sweep(sweep)
    assert [(g.setting, g.method) for g in groups] == [(a, m) for a in ALPHAS for m in METHODS]
    second = groups[1]
    assert [cell.path for cell in second.search] == [
        "alpha-0.1/fedlabel/lr1e-05-seed7",
        "alpha-0.1/fedlabel/lr3-seed7",
    ]
    assert [cell.path for cell in second.final[3.0]] == [f"alpha-0.1/fedlabel/lr3-seed{seed}" for seed in (0, 1, 2)]
    assert second.search[1].config == load_config(
        [],
        ["num_rounds=9", "partition.dirichlet_alpha=0.1", "training.lr=3", "seed=7", "evaluation.split=validation"],
    )
    assert groups[2].final[0.05][2].config == load_config(
        [],
        ["num_rounds=9", "partition.dirichlet_alpha=1", "method.name=supervised", "training.lr=0.05", "seed=2"],
    )
    paths = [c.path for g in groups for c in [*g.search, *(c for cells in g.final.values() for c in cells)]]
    assert len(set(paths)) == len(paths) == 4 * (2 + 2 * 3)


def test_settings_may_be_mixes_of_kinds_of_label() -> None:
    kinds = {"two kinds": ["supervision.mix=[{share: 0.5, kind: noisy, noise_rate: 0.2}, {share: 0.5}]"], "one": []}
    groups = plan_sweep(parse_sweep({"methods": METHODS, "settings": kinds}))
    for group in groups:
        config = group.final[None][0].config
        assert config is not None
        assert [part.kind for part in config.supervision.mix] == (
            ["noisy", "few_labels"] if len(group.setting) > 3 else []
        )
        assert parse_config(to_yaml(config)) == config
    assert [cell.error for group in groups for cell in group.final[None]] == [""] * 12


def test_plan_without_search_or_settings() -> None:
    (group,) = plan_sweep(parse_sweep({"methods": {"A": []}, "seeds": [4], "final_split": "validation"}))
    (cell,) = group.final[None]
    assert (group.search, cell.path, cell.name) == ((), "all/a/seed4", "all / A / seed 4")
    assert cell.config is not None
    assert (cell.config.seed, cell.config.evaluation.split) == (4, "validation")


def test_an_impossible_row_says_why_and_the_others_are_planned() -> None:
    groups = plan_sweep(parse_sweep({"methods": {"A": ["method.lambda_00=1"], "B": []}}))
    assert groups[0].final[None][0].config is None
    assert (
        "`method.lambda_00` is not a field of fedlabel. Did you mean method.lambda_0?" in groups[0].final[None][0].error
    )
    assert groups[1].final[None][0].config is not None


@pytest.mark.parametrize(
    ("scores", "lower", "chosen"),
    [
        ({0.05: 0.7, 0.15: 0.8, 0.45: 0.6}, False, 0.15),
        ({0.45: 0.8, 0.05: 0.7, 0.15: 0.8}, False, 0.15),  # a tie: the smaller value
        ({0.05: 0.7, 0.15: 0.8, 0.45: 0.6}, True, 0.45),
        ({0.05: None, 0.15: 0.1}, False, 0.15),
        ({0.05: None}, False, None),
    ],
)
def test_choose(scores: dict[float, float | None], lower: bool, chosen: float | None) -> None:
    assert choose(scores, lower) == chosen


@pytest.mark.parametrize(("value", "text"), [(3.0, "3"), (0.05, "0.05"), (1e-05, "1e-05")])
def test_values_read_back_equal(value: float, text: str) -> None:
    assert format_value(value) == text
    assert load_config([], [f"training.lr={text}"]).training.lr == value


def fake_work(job: tuple[ExperimentConfig, Path, bool], tell: Callable[[Any], None]) -> None:
    """Stands for a run: accuracy 1 - |lr - 0.1|. FedLabel fails at lr 0.2, and at alpha 1 always."""
    config, path, resume = job
    tell((1, config.num_rounds))
    assert resume == path.exists()
    if config.partition.dirichlet_alpha == 1 and config.method.name == "fedlabel":
        raise ValueError("always fails")
    if config.method.name == "fedlabel" and config.training.lr == 0.2:
        raise ValueError("diverged")
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").write_text(to_yaml(config))
    accuracy = 1 - abs(config.training.lr - 0.1)
    (path / "summary.json").write_text(json.dumps({"eval/accuracy": {"mean_last_tenth": accuracy, "last": 0.0}}))


def sweep_with_fakes(out: Path, **content: Any) -> tuple[bool, list[Event]]:
    events: list[Event] = []
    sweep = parse_sweep({"methods": METHODS, "settings": ALPHAS, "seeds": [0, 1], **content})
    return run_sweep(sweep, out, 2, fake_work, events.append), events


@pytest.mark.slow
def test_what_fails_is_reported_and_all_else_is_run(tmp_path: Path) -> None:
    """Labelled only: 0.05 and 0.15 tie at 0.95, the smaller one wins, at the edge. FedLabel: 0.2 fails, so 0.05 is
    chosen from 0.05 (0.95) and 0.15 (0.95); where all fail, the final runs are failed too, without being started."""
    search = {"values": [0.05, 0.15, 0.2], "seed": 7}
    complete, events = sweep_with_fakes(tmp_path, search=search)
    assert not complete
    found = ledger(tmp_path)
    assert found["planned_runs"] == 4 * (3 + 2) == len(found["runs"])
    by_path = {row["path"]: row for row in found["runs"]}
    failed = {path: row["error"] for path, row in by_path.items() if row["status"] == "failed"}
    assert failed.pop("alpha-0.1/fedlabel/lr0.2-seed7") == "diverged"
    assert [failed.pop(f"alpha-1/fedlabel/lr{lr}-seed7") for lr in (0.05, 0.15, 0.2)] == ["always fails"] * 3
    assert set(failed.values()) == {"no run of its search was done"}
    assert len(failed) == 2
    assert by_path["alpha-0.1/fedlabel/lr0.05-seed1"] == {
        "setting": "alpha 0.1",
        "method": "FedLabel",
        "seed": 1,
        "value": 0.05,
        "role": "final",
        "path": "alpha-0.1/fedlabel/lr0.05-seed1",
        "status": "done",
        "error": "",
    }
    chosen = {(row["setting"], row["method"]): row for row in found["chosen"]}
    assert [row["value"] for row in chosen.values()].count(0.05) == 3
    assert chosen["alpha 1", "FedLabel"]["value"] is None
    assert chosen["alpha 0.1", "FedLabel"]["scores"] == [
        {"value": 0.05, "score": 0.95},
        {"value": 0.15, "score": pytest.approx(0.95)},
        {"value": 0.2, "score": None},
    ]
    assert "edge of what was tried (0.05, 0.15, 0.2)" in chosen["alpha 0.1", "FedLabel"]["warning"]
    assert {event.kind for event in events} == {"started", "round", "done", "failed", "chosen", "warning"}
    order = [event.cell.role for event in events if event.kind == "started" and event.cell]
    assert order == sorted(order, key=["search", "final"].index), "a final run waits behind the searches"
    assert found["sweep"]["search"]["values"] == [0.05, 0.15, 0.2]
    assert parse_sweep(found["sweep"]).methods == METHODS


@pytest.mark.slow
def test_a_second_call_runs_what_is_left(tmp_path: Path) -> None:
    """The middle one of three values scores best: no warning. More seeds later start only these."""
    search = {"values": [0.05, 0.1, 0.15], "seed": 7}
    complete, events = sweep_with_fakes(tmp_path, search=search, settings={})
    assert complete
    assert sum(event.kind == "done" for event in events) == 2 * (3 + 2)
    assert [row["warning"] for row in ledger(tmp_path)["chosen"]] == ["", ""]
    before = ledger(tmp_path)
    complete, events = sweep_with_fakes(tmp_path, search=search, settings={})
    assert {event.kind for event in events} == {"kept", "chosen"}
    assert ledger(tmp_path) == before
    complete, events = sweep_with_fakes(tmp_path, search=search, settings={}, seeds=[0, 1, 5])
    assert {event.cell.path for event in events if event.kind == "done" and event.cell} == {
        "all/labelled-only/lr0.1-seed5",
        "all/fedlabel/lr0.1-seed5",
    }
    assert complete


@pytest.mark.slow
def test_one_search_for_all_settings(tmp_path: Path) -> None:
    """Both settings take what was chosen at alpha 0.1: 2 methods x 3 values searched, 2 x 2 x 2 final runs."""
    search = {"values": [0.05, 0.1, 0.15], "seed": 7, "setting": "alpha 0.1"}
    methods = {"A": ["method.name=supervised"], "B": ["method.name=supervised", "training.prox_mu=0.1"]}
    complete, events = sweep_with_fakes(tmp_path, search=search, methods=methods)
    assert complete
    found = ledger(tmp_path)
    assert found["planned_runs"] == len(found["runs"]) == 2 * 3 + 8
    assert {row["setting"] for row in found["runs"] if row["role"] == "search"} == {"alpha 0.1"}
    assert [row["value"] for row in found["chosen"]] == [0.1] * 4
    assert sum(event.kind == "started" for event in events) == 14
    again, events = sweep_with_fakes(tmp_path, search=search, methods=methods)
    assert again
    assert {event.kind for event in events} == {"kept", "chosen"}


@pytest.mark.parametrize("folder", ["lr0.2-seed7", "lr0.05-seed0"], ids=["search", "final"])
def test_a_run_of_an_earlier_version_is_named(folder: str, tmp_path: Path) -> None:
    """Its mean was another one; nothing is run beside it."""
    path = tmp_path / "out" / "all" / "labelled-only" / folder
    path.mkdir(parents=True)
    sweep = load_sweep(write(tmp_path / "s.yaml", search=SEARCH))
    cells = [
        cell for group in plan_sweep(sweep) for cell in [*group.search, *(c for cs in group.final.values() for c in cs)]
    ]
    (config,) = [cell.config for cell in cells if tmp_path / "out" / cell.path == path]
    assert config is not None
    (path / "config.yaml").write_text(to_yaml(config))
    means = {"last": 0.5, "best": 0.5, "mean_last_10": 0.5}
    (path / "summary.json").write_text(json.dumps({"eval/accuracy": means}))
    result = call(tmp_path / "s.yaml", "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert f"{path / 'summary.json'} is of an earlier version, whose mean was that of the last ten evaluations" in line
    assert line.endswith(f"move {path} away and run it again, or use another --out.")
    assert not (tmp_path / "out" / "sweep.json").exists()


@pytest.mark.slow
def test_a_metric_that_no_run_has_fails_the_search(tmp_path: Path) -> None:
    search = {"values": [0.05], "metric": "eval/auc"}
    complete, _ = sweep_with_fakes(tmp_path, search=search, settings={}, methods={"A": ["method.name=supervised"]})
    assert not complete
    first, *finals = ledger(tmp_path)["runs"]
    assert "`search.metric` (=eval/auc) is not in" in first["error"]
    assert "it has eval/accuracy." in first["error"]
    assert {row["error"] for row in finals} == {"no run of its search was done"}


def test_two_processes_do_not_run_one_sweep(tmp_path: Path) -> None:
    with closing(FolderLock(tmp_path)), pytest.raises(ValueError, match="Another process is writing into"):
        sweep_with_fakes(tmp_path, settings={}, methods={"A": ["method.name=supervised"]})
    assert not (tmp_path / "sweep.json").exists()


def test_runs_of_another_sweep_are_not_reused(tmp_path: Path) -> None:
    """Found on disk: 40 rounds where 9 are asked, and another folder for the data, which changes nothing."""
    sweep = parse_sweep({"methods": {"A": []}, "overrides": ["num_rounds=9", "data.root=/here"], "seeds": [0]})
    folder = tmp_path / "all" / "a" / "seed0"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(load_config([], ["num_rounds=9", "data.root=/there"])))
    assert finished_cells(plan_sweep(sweep), tmp_path) == set()  # begun only
    (folder / "summary.json").write_text("{}")
    assert finished_cells(plan_sweep(sweep), tmp_path) == {"all/a/seed0"}
    (folder / "config.yaml").write_text(to_yaml(load_config([], ["num_rounds=40"])))
    with pytest.raises(ConfigError, match=r"all/a/seed0 holds a run of another .*: num_rounds \(there 40, asked 9\)"):
        finished_cells(plan_sweep(sweep), tmp_path)
    (folder / "config.yaml").write_text("seed: [")
    with pytest.raises(ConfigError, match=r"config.yaml cannot be read"):
        finished_cells(plan_sweep(sweep), tmp_path)


@pytest.mark.parametrize("key", ["training.lr", "training.batch_size", "training.max_grad_norm", "method.lambda_0"])
def test_a_searched_value_is_as_if_it_had_been_loaded(key: str) -> None:
    sweep = parse_sweep(
        {"methods": {"FedLabel": []}, "seeds": [0], "search": {"key": key, "values": [4, 8, 16], "seed": 7}}
    )
    (group,) = plan_sweep(sweep)
    for value, (cell,) in group.final.items():
        assert value is not None
        asked = load_config([], [f"{key}={value:.0f}", "seed=0", "evaluation.split=test"])
        assert cell.config == asked
        assert to_yaml(asked) == to_yaml(cell.config)


def test_a_searched_value_out_of_range_is_impossible_and_the_others_are_not() -> None:
    search = {"key": "method.confidence_threshold", "values": [0.5, 7.0, 0.9], "seed": 7}
    (group,) = plan_sweep(parse_sweep({"methods": {"FedLabel": []}, "search": search}))
    errors = {value: cells[0].error for value, cells in group.final.items()}
    assert errors.pop(7.0).startswith("`method.confidence_threshold` (=7.0)")
    assert errors == {0.5: "", 0.9: ""}


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    file = write(tmp_path / "s.yaml", settings=ALPHAS, search=SEARCH, methods={**METHODS, "odd": ["method.x=1"]})
    result = call(file, "num_rounds=2", "--dry-run", "--out", tmp_path / "out")
    assert result.exit_code == 1, result.output  # one row is impossible
    assert "3 methods x 2 settings: 12 runs to search, 18 final (3 seeds)" in result.output
    assert "lr=0.05, lr=0.2" in result.output
    one = next(iter(ALPHAS))
    assert f"Impossible: {one} / odd / lr=0.05; {one} / odd / lr=0.2; " in result.output
    assert "and 1 more: `method.x` is not" in result.output
    possible = write(tmp_path / "possible.yaml", settings=ALPHAS)
    assert call(possible, "--dry-run", "--out", tmp_path / "out").exit_code == 0
    assert not (tmp_path / "out").exists()


def test_overrides_of_the_command_line_are_the_sweeps(tmp_path: Path) -> None:
    file = write(tmp_path / "s.yaml", overrides=["num_rounds=9"])
    assert load_sweep(file, ["num_rounds=2"]).overrides == ["num_rounds=9", "num_rounds=2"]
    result = call(file, "other.yaml")
    assert result.exit_code == 2
    assert "`other.yaml` must have the form key=value" in result.stderr


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_a_sweep_that_ships_can_be_planned(file: Path) -> None:
    for group in plan_sweep(load_sweep(file)):
        assert all(cell.config is not None for cells in group.final.values() for cell in cells)


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_and_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """Two seeds at a time; killed in the middle of both; the same command leaves the same runs as one that was not."""
    overrides = [each for each in TINY if not each.startswith(("num_rounds", "method."))]
    file = write(tmp_path / "s.yaml", overrides=[*overrides, "num_rounds=60"], seeds=[0, 1], methods={"A": []})
    mark, out = str(tmp_path), tmp_path / "out"
    command = fedlabel_command("sweep", str(file), "--out", str(out))
    process = start(command, tmp_path / "log", tmp_path, environment(FEDLABEL_TEST_SWEEP=mark))
    runs = [out / "all" / "a" / f"seed{seed}" for seed in (0, 1)]
    try:
        begun = lambda: all((run / "metrics.jsonl").exists() and len(read_metrics(run)) > 3 for run in runs)  # noqa: E731
        wait_until(begun, 120, (tmp_path / "log").read_text())
        process.send_signal(signal.SIGKILL)
        process.wait(20)
        wait_until(lambda: not marked("FEDLABEL_TEST_SWEEP", mark), 15, "a worker stays")
    finally:
        stop_marked("FEDLABEL_TEST_SWEEP", mark)
    assert not any((run / "summary.json").exists() for run in runs), "killed too late to say anything"
    assert ledger(out)["runs"] == []
    for folder in (out, tmp_path / "whole"):
        command = fedlabel_command("sweep", str(file), "--out", str(folder))
        done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert "2/2 done: final all / A / seed" in done.stdout
        assert "finished" not in done.stdout
        assert [row["status"] for row in ledger(folder)["runs"]] == ["done", "done"]
        assert "2 of them finished" in call(file, "--out", folder, "--dry-run").output
    for run in runs:
        assert_same_run(run, tmp_path / "whole" / run.relative_to(out))


@pytest.mark.slow
def test_a_data_error_in_a_worker_is_status_1(tmp_path: Path) -> None:
    file = write(tmp_path / "s.yaml", overrides=list(TINY[:3]), seeds=[0], methods={"A": ["num_clients=5000"]})
    result = call(file, "--out", tmp_path / "out", "--workers", 1)
    assert result.exit_code == 1
    assert "1/1 failed: final all / A / seed 0" in result.output
    assert "`num_clients` (=5000)" in ledger(tmp_path / "out")["runs"][0]["error"]
    assert "Some runs failed" in result.stderr
