"""Whole runs with networks of a user's own."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

import fedlabel
from clients.client_app import app
from fedlabel.config import load_config
from fedlabel.experiment import Experiment
from fedlabel.learning.client import LocalRound, train_clients
from fedlabel.models import own as own_module
from fedlabel.models import pass_model
from server.grids.flower import FlowerGrid
from server.server_app import run_federation
from tests.cli.invoking import invoke
from tests.integration.local_nodes import LocalNodes
from tests.integration.tiny import TINY, assert_same_run, assert_same_weights, final_weights
from tests.models.own_nets import Dropping, Plain, linear

NETS = "tests.models.own_nets"
OWN = (*(each for each in TINY if not each.startswith("model.")), "evaluation.figures=false")
KEYS = {
    "dp_ssl": (
        *("method.num_functions=10", "method.heads_per_class=2", "method.functions_rounds=2", "num_rounds=4"),
        *("method.label_model_rounds=1", "method.assignment_rounds=1"),
    ),
    "llp_bp": ("supervision.kind=bags", "supervision.bag_size=8", "method.stage_rounds=1", "num_rounds=2"),
}


def run(out: Path, name: str, *overrides: str, resume: bool = False) -> fedlabel.RunResult:
    return fedlabel.run(overrides=[*OWN, *overrides], name=name, out=out, resume=resume)


def test_a_run_with_a_network_by_name_is_used_and_exported(tmp_path: Path) -> None:
    result = run(tmp_path, "own", f"model.name={NETS}:Plain", "model.args={hidden: 6}", "model.embedding=features")
    again = fedlabel.load_run(result.path)
    images = np.zeros((2, 8, 8), np.uint8)
    assert np.array_equal(again.predict(images).probabilities, result.predict(images).probabilities)
    invoke("export", result.path, "--out", tmp_path / "model")
    np.savez(tmp_path / "in.npz", x=images)
    said = invoke("predict", tmp_path / "model", tmp_path / "in.npz", "--out", tmp_path / "o.csv", status=2)
    assert "is code that is not fedlabel's, and is not imported from here. --program runs" in said
    invoke("predict", tmp_path / "model", tmp_path / "in.npz", "--out", tmp_path / "o.csv", "--program")
    invoke("predict", result.path, tmp_path / "in.npz", "--out", tmp_path / "run.csv")
    assert (tmp_path / "o.csv").read_text().splitlines()[0] == (tmp_path / "run.csv").read_text().splitlines()[0]


@pytest.mark.parametrize("method", ["dp_ssl", "llp_bp"])
def test_methods_that_need_embeddings_get_them_from_a_layer(method: str, tmp_path: Path) -> None:
    keys = KEYS[method]
    dropped = ("method.", "supervision.") if method == "llp_bp" else ("method.",)
    given = [each for each in OWN if not each.startswith(dropped)]
    own = [*given, f"method.name={method}", *keys, f"model.name={NETS}:Plain"]
    result = fedlabel.run(overrides=[*own, "model.embedding=features", "model.trainable=''"], name="x", out=tmp_path)
    assert result.metrics[-1]["eval/accuracy"] >= 0
    with pytest.raises(ValueError, match="gives no embeddings, which method .* needs: set model.embedding"):
        fedlabel.run(overrides=own, name="y", out=tmp_path)
    if method == "llp_bp":
        with pytest.raises(ValueError, match="needs a linear layer that makes the logits of this layer's output"):
            fedlabel.run(overrides=[*own, "model.embedding=conv"], name="z", out=tmp_path)


@pytest.mark.parametrize(
    ("stack", "model", "trained", "strategy"),
    [
        ("off", f"{NETS}:Plain", "fc", []),
        ("2", f"{NETS}:Plain", "fc", []),
        ("2", "mlp", "output", ["strategy.name=FedAvgM", "strategy.args={server_momentum: 0.9}"]),
    ],
)
def test_what_is_frozen_stays_and_the_rest_moves(
    stack: str, model: str, trained: str, strategy: list[str], tmp_path: Path
) -> None:
    """To the bit, running statistics too; alone and in stacks alike, and where the server keeps momentum."""
    keys = [f"model.name={model}", f"model.trainable='^{trained}'", f"grid.stack={stack}", *strategy]
    result = run(tmp_path, "x", *keys)
    start = Experiment(result.config).initial_state
    for name, value in final_weights(result.path).items():
        assert torch.equal(value, start[name]) != name.startswith(trained), name


def test_clients_do_not_move_what_is_frozen() -> None:
    """Before the server puts it back, alone and in a stack, with weight decay and momentum."""
    keys = ["model.name=mlp", "model.trainable='^output'", "training.weight_decay=0.1", "training.momentum=0.9"]
    experiment = Experiment(
        load_config([], [*(each for each in OWN if not each.startswith("method.")), *keys, "method.name=supervised"])
    )
    start = experiment.initial_state
    rounds = [LocalRound(experiment.client_data(client), client, {}) for client in (0, 1)]
    for clients in (rounds[:1], rounds):
        updates = train_clients(experiment.recipe, experiment.trainer, start, clients, 1)
        assert updates[0].stacked == (len(clients) > 1)
        for update in updates:
            (part,) = update.parts.values()
            assert {name for name, value in part.state.items() if not torch.equal(value, start[name])} == {
                *("output.weight", "output.bias")
            }


def test_a_phase_that_would_train_nothing_is_refused(tmp_path: Path) -> None:
    module = linear(10, (1, 8, 8))
    module.requires_grad_(False)
    with pytest.raises(ValueError, match="leaves nothing to train to phase"):
        run(tmp_path, "x", f"model.name={pass_model(module)}")
    private = ["privacy.kind=server", "privacy.clipping_norm=1", "privacy.noise_multiplier=1", "privacy.delta=0.1"]
    own = [*private, "training.weight_by=uniform", "model.trainable='^fc'", f"model.name={NETS}:Plain"]
    with pytest.raises(ValueError, match=r"`model.trainable` \(=\^fc\) freezes 9 arrays, to which privacy.kind=server"):
        run(tmp_path, "y", *own)


def test_a_module_is_checked_when_its_run_is_loaded(tmp_path: Path) -> None:
    module = Plain(10, (1, 8, 8))
    result = run(tmp_path, "passed", f"model.name={pass_model(module)}", "num_rounds=1")
    assert fedlabel.load_run(result.path, model=module).metrics == result.metrics
    with pytest.raises(ValueError, match=r"`model` \(=python:Plain#\w+\) is not what the run .* was made with"):
        fedlabel.load_run(result.path, model=Plain(10, (1, 8, 8), 5))


def test_pretrained_weights_are_the_start_and_the_note_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A resumed run needs the file as it was; a model that is loaded does not need it."""
    torch.save(Plain(7, (1, 8, 8)).state_dict(), tmp_path / "w.pt")
    keys = [f"model.name={NETS}:Plain", f"model.weights={tmp_path / 'w.pt'}"]
    result = run(tmp_path, "x", *keys, "num_rounds=1")
    notes = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert sum("9 of 11 arrays were loaded" in each for each in notes) == 1
    torch.save(Plain(7, (1, 8, 8)).state_dict(), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"changed: model.weights"):
        run(tmp_path, "x", *keys, "num_rounds=2", resume=True)
    (tmp_path / "w.pt").unlink()
    assert fedlabel.load_run(result.path).model is not None


def test_weights_are_not_sent_to_nodes_as_a_path(tmp_path: Path) -> None:
    """They get the model; its file is the server's, and a node would refuse to open one of this name."""
    other = Experiment(load_config([], [*TINY, "seed=7"])).initial_state
    torch.save(other, tmp_path / "w.pt")
    config = load_config([], [*TINY, f"model.weights={tmp_path / 'w.pt'}", "evaluation.figures=false", "num_rounds=1"])
    nodes = LocalNodes(app, config.num_clients)
    run_federation(config, FlowerGrid(nodes), tmp_path / "deployed")
    simulated = fedlabel.run(config, name="simulated", out=tmp_path)
    assert_same_weights(final_weights(tmp_path / "deployed"), final_weights(simulated.path))


def test_twins_need_different_starts(tmp_path: Path) -> None:
    keys = ["method.name=co_teaching", "supervision.kind=noisy", "supervision.noise_rate=0.2"]
    given = [each for each in OWN if not each.startswith("method.")]
    name = pass_model(linear(10, (1, 8, 8)))
    with pytest.raises(ValueError, match="trains 2 networks, .* a module gives all the same: .* or pass a function"):
        fedlabel.run(overrides=[*given, *keys, f"model.name={name}"], name="x", out=tmp_path)
    own = [*given, *keys, f"model.name={pass_model(linear)}"]
    assert fedlabel.run(overrides=own, name="y", out=tmp_path).metrics


def test_a_network_that_cannot_be_stacked_trains_one_by_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And it is said why; the result is that of a run without stacks."""
    own = [f"model.name={NETS}:Dropping", "grid.stack=4"]
    stacked = run(tmp_path, "stacked", *own)
    assert any("Clients cannot be stacked (" in each.getMessage() for each in caplog.records)
    assert_same_run(stacked.path, run(tmp_path, "alone", own[0], "grid.stack=off").path)


@pytest.mark.slow
def test_workers_of_ray_get_what_was_passed_from_python(
    shared_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class that no module has; resuming needs the same one, with or without Ray."""

    class Local(Dropping):
        pass

    name = pass_model(Local)
    there = run(tmp_path, "ray", f"model.name={name}", "grid.kind=ray", "grid.num_workers=2", "grid.stack=off")
    here = run(tmp_path, "here", f"model.name={name}", "grid.stack=off")
    assert_same_run(there.path, here.path)
    monkeypatch.setattr(own_module, "_PASSED", {})
    said = invoke("run", "--resume", "--name", "here", "--out", tmp_path, "num_rounds=4", status=2)
    assert "was passed from Python, and this process has not got it" in said
