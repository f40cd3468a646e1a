"""Which round's model a run puts forward."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fedlabel
from fedlabel.config import ConfigError, load_config
from fedlabel.experiment import Experiment
from fedlabel.methods.llp_bp import LLPBP
from fedlabel.methods.supervised import Supervised
from fedlabel.record.results import best_row
from server.checkpoint import load_checkpoint
from server.selection import SELECTED, Selection
from tests.methods.recipes import task
from tests.test_resume import final_weights, rows, stop_at

BAGS = [
    "data.name=breast_cancer",
    "model.name=mlp",
    "num_clients=3",
    "fraction_train=1.0",
    "num_rounds=6",
    "method.name=llp_bp",
    "method.stage_rounds=3",
    "training.local_steps=3",
    "training.lr=0.05",
    "supervision.kind=bags",
    "supervision.bag_size=4",
    "evaluation.panel_samples=0",
    "checkpoint.every=1",
    "checkpoint.keep=9",
]


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor([value])}


def test_the_best_of_all_rounds_and_of_the_stage(tmp_path: Path) -> None:
    """Errors .4, .2, .3 in the first stage, .25, .25 in the second: the file has round 2, the stages 2 and 4."""
    recipe = LLPBP(stage_rounds=3).recipe(task(2))
    selection = Selection(tmp_path, "select/bag_mae", recipe, [], {})
    for number, error in ((1, 0.4), (2, 0.2), (3, 0.3)):
        selection.see(number, {"select/bag_mae": error}, weights(number))
    selection.see(4, {"eval/bag_mae": 0.0}, weights(9))  # a round that was not scored
    assert selection.begin_stage() == weights(2)
    assert selection.stage_model == {}
    for number, error in ((4, 0.25), (5, 0.25)):
        selection.see(number, {"select/bag_mae": error}, weights(number))
    assert selection.begin_stage() == weights(4)
    assert torch.load(tmp_path / SELECTED.format(2), weights_only=True) == weights(2)
    assert {path.name for path in tmp_path.iterdir()} == {"selected_000001.pt", "selected_000002.pt"}
    selection.settle()
    assert {path.name for path in tmp_path.iterdir()} == {"selected_000002.pt"}


@pytest.mark.parametrize(("done", "later", "kept", "in_file"), [(4, 0.24, 5, None), (4, 0.26, 4, None), (4, 0.1, 5, 5)])
def test_it_goes_on_where_a_run_stands(tmp_path: Path, done: int, later: float, kept: int, in_file: int | None) -> None:
    """Rounds 1 to 3 with errors of .4, .2, .3 are a stage of their own; round 4 has .25."""
    errors = [0.4, 0.2, 0.3, 0.25][:done]
    found = [{"round": number, "select/bag_mae": error} for number, error in enumerate(errors, 1)]
    recipe = LLPBP(stage_rounds=3).recipe(task(2))
    selection = Selection(tmp_path, "select/bag_mae", recipe, found, weights(4))
    selection.see(5, {"select/bag_mae": later}, weights(5))
    assert selection.stage_model == weights(kept)
    assert (tmp_path / SELECTED.format(5)).exists() == (in_file is not None)


def test_a_round_that_is_done_again_leaves_no_model_of_the_first_time(tmp_path: Path) -> None:
    """Killed after round 4, which was the best; the checkpoint is of round 3, and then round 4 turns out worse."""
    recipe = Supervised().recipe(task())
    first = Selection(tmp_path, "select/loss", recipe, [], {})
    found = []
    for number, loss in ((1, 0.4), (2, 0.2), (3, 0.3)):
        first.see(number, {"select/loss": loss}, weights(number))
        found.append({"round": number, "select/loss": loss})
    first.settle()
    first.see(4, {"select/loss": 0.1}, weights(4))
    again = Selection(tmp_path, "select/loss", recipe, found, weights(2))
    again.see(4, {"select/loss": 0.25}, weights(4))
    again.settle()
    assert [path.name for path in tmp_path.iterdir()] == ["selected_000002.pt"]
    assert again.stage_model == weights(2)


def test_nothing_is_selected_without_a_metric_and_high_accuracy_is_good(tmp_path: Path) -> None:
    recipe = Supervised().recipe(task())
    without = Selection(tmp_path, None, recipe, [{"round": 1}], {})
    without.see(1, {"select/accuracy": 0.5}, weights(1))
    assert (without.stage_model, list(tmp_path.iterdir())) == ({}, [])
    accuracy = Selection(tmp_path, "select/accuracy", recipe, [], {})
    for number, value in enumerate((0.5, 0.7, 0.7, 0.6)):
        accuracy.see(number, {"select/accuracy": value}, weights(number))
    assert accuracy.stage_model == weights(1)
    assert best_row([{"a": 1}], "select/accuracy") is None


@pytest.mark.parametrize("select", ["bag_mae", "instance_auc"])
def test_a_run_says_what_it_selected_and_hands_it_to_the_next_stage(select: str, tmp_path: Path) -> None:
    result = fedlabel.run(overrides=[*BAGS, f"evaluation.select={select}"], name="run", out=tmp_path)
    tag = "select/" + select.removeprefix("instance_")
    scores = [row[tag] for row in result.metrics]
    sign = -1 if select == "bag_mae" else 1
    best = max(range(6), key=lambda place: sign * scores[place])
    assert result.summary["selected_round"] == best + 1
    assert result.summary["eval/auc"]["selected"] == result.metrics[best]["eval/auc"]
    written = json.loads((result.path / "summary.json").read_text())
    assert written["eval/accuracy"]["selected"] == result.metrics[best]["eval/accuracy"]
    saved = [load_checkpoint(path) for path in sorted((result.path / "checkpoints").glob("round_*.ckpt"))]
    (file,) = (result.path / "checkpoints").glob("selected_*.pt")
    assert file.name == SELECTED.format(best + 1)
    chosen = torch.load(file, weights_only=True)
    assert all(torch.equal(value, saved[best].model[name]) for name, value in chosen.items())
    first_stage = max(range(3), key=lambda place: sign * scores[place])
    for later in saved[3:]:
        assert all(torch.equal(value, saved[first_stage].model[name]) for name, value in later.previous.items())


def test_what_is_selected_does_not_depend_on_when_the_run_is_to_end(tmp_path: Path) -> None:
    """The last five of six rounds are all evaluated, but only each second one may be selected: the second stage begins
    with the model of round 2, as in a run of ten rounds, whose last ones are later."""
    overrides = [*BAGS, "evaluation.select=bag_mae", "evaluation.every=2"]
    found = {}
    for rounds in (6, 10):
        result = fedlabel.run(overrides=[*overrides, f"num_rounds={rounds}"], name=str(rounds), out=tmp_path)
        assert [row["round"] for row in result.metrics if "select/bag_mae" in row] == list(range(2, rounds + 1, 2))
        evaluated = {row["round"] for row in result.metrics if "eval/accuracy" in row}
        assert evaluated == {*range(2, rounds + 1, 2), *range(rounds - 4, rounds + 1)}
        found[rounds] = [row["train/loss"] for row in result.metrics[:6]]
    assert found[6] == found[10]


def test_single_labels_of_the_validation_split_decide_only_where_asked_for(tmp_path: Path) -> None:
    """Poisoned validation labels change what instance_accuracy selects by, and nothing that bag_mae does."""
    found = {}
    for select in ("bag_mae", "instance_accuracy"):
        for poisoned in (False, True):
            config = load_config([], [*BAGS, f"evaluation.select={select}"])
            experiment = Experiment(config)
            assert experiment.selects_by is not None
            if poisoned:
                split = experiment.selects_by.split
                experiment.selects_by = experiment.selects_by._replace(split=replace(split, labels=1 - split.labels))
            found[select, poisoned] = experiment.selection_score(1, {"model": experiment.initial_state}, {})
    assert found["bag_mae", False] == found["bag_mae", True]
    first, second = found["instance_accuracy", False], found["instance_accuracy", True]
    assert first is not None
    assert second == pytest.approx(1 - first)


def test_selection_is_resumed_to_the_bit(tmp_path: Path) -> None:
    overrides = [*BAGS, "evaluation.select=instance_auc"]
    whole = fedlabel.run(overrides=overrides, name="whole", out=tmp_path)
    stop_at(2, tmp_path, *overrides)
    resumed = fedlabel.run(name="x", out=tmp_path, resume=True)
    assert rows(resumed.path) == rows(whole.path)
    assert resumed.summary["selected_round"] == whole.summary["selected_round"]
    file = SELECTED.format(whole.summary["selected_round"])
    for find in (final_weights, lambda path: torch.load(path / "checkpoints" / file, weights_only=True)):
        expected = find(whole.path)
        assert all(torch.equal(value, expected[name]) for name, value in find(resumed.path).items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.select=auc"], r"`evaluation.select` \(=auc\) must be one of null, bag_mae, instance_auc"),
        (["evaluation.select=bag_mae"], r"`evaluation.select` \(=bag_mae\) needs bags, and there are none"),
        (
            ["evaluation.select=instance_auc"],
            r"`evaluation.select` \(=instance_auc\) needs two classes, and there are 10",
        ),
        (
            ["evaluation.select=instance_loss", "data.validation_fraction=0"],
            r"`evaluation.select` \(=instance_loss\) goes by the validation split, which is empty",
        ),
        (
            [*BAGS, "evaluation.select=instance_auc", "data.validation_fraction=0.003"],
            r"`evaluation.select` \(=instance_auc\) needs samples of both classes in the validation split, and all ",
        ),
    ],
)
def test_what_cannot_select_is_refused(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        fedlabel.run(overrides=overrides, name="run", out=tmp_path)
    assert not (tmp_path / "run").exists()
