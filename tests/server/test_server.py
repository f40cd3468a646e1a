"""The steps of a round that a server takes: how a stage begins, what is sent, and what real nodes are asked."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.superlink.grid.http_grid import HttpGrid

import clients.client_app
import server.observers
import server.server
from clients.client_app import app
from fedlabel.cohort import Invitation
from fedlabel.config import load_config
from fedlabel.data.federation import Federation
from fedlabel.experiment import Experiment
from fedlabel.methods.batch import StateDict
from fedlabel.methods.losses import labels_loss
from fedlabel.methods.recipe import LabelKinds, Phase, Recipe, Stage, Start
from fedlabel.record.json_files import read_metrics
from server.checkpoint import load_checkpoint
from server.grids.flower import FlowerGrid, messages_to
from server.grids.in_process import InProcessGrid
from server.observers import observers_of
from server.server import Server
from server.server_app import run_federation
from server.state import ServerState
from tests.integration.local_nodes import LocalNodes

TINY = (
    *("num_clients=3", "fraction_train=1.0", "num_rounds=6", "partition.kind=iid", "data.train_samples=120"),
    *("model.name=mlp", "model.hidden_layers=[8]", "training.local_steps=2", "training.batch_size=16", "device=cpu"),
    "evaluation.figures=false",
)
MOVING = ("strategy.name=FedAvgM", "strategy.args.server_momentum=0.5")
NONE: StateDict = {}
PHASES = (Phase("train", labels_loss),)
MOMENTUM = {"momentum_vector": {"list": [np.ones(1, np.float32)]}}


class RealNodes(LocalNodes, HttpGrid):
    """Flower's grid of a SuperLink, whose nodes are in this process."""


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return Experiment(load_config([], [*TINY, *MOVING, "method.name=supervised"]))


def filled(experiment: Experiment, value: float) -> StateDict:
    return {name: torch.full_like(weights, value) for name, weights in experiment.initial_state.items()}


def opened(experiment: Experiment, stages: tuple[Stage, ...], state: ServerState, folder: Path) -> Server:
    """Returns a server that goes on from a state with the given stages and three simulated clients."""
    experiment = copy.copy(experiment)
    experiment.recipe = Recipe(stages, LabelKinds.TRUE)
    rows = []
    if state.selected:
        chosen = replace(experiment.config.evaluation, select="instance_accuracy")
        experiment.config = replace(experiment.config, evaluation=chosen)
        rows = [{"round": number + 1, "select/accuracy": 0.5} for number in range(state.round_number)]
    run: Any = SimpleNamespace(checkpoints=folder, read_metrics=lambda: rows)
    return Server(experiment, InProcessGrid(), run, state, lambda number, metrics: None)


def same(first: StateDict, second: StateDict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def begun(
    experiment: Experiment, start: Any, folder: Path, average: StateDict = NONE, selected: StateDict = NONE
) -> tuple[ServerState, ServerState]:
    """Returns the state after round 2 and the one that round 3 starts from, where a stage of two rounds has ended."""
    state = ServerState(2, filled(experiment, 2), "", MOMENTUM, average=average, selected=selected)
    stages = (Stage(PHASES, rounds=2), Stage(PHASES, start=start))
    return state, opened(experiment, stages, state, folder).begin_stage(state, 3)


def test_a_stage_with_fresh_weights_keeps_the_model_before_as_previous(experiment: Experiment, tmp_path: Path) -> None:
    state, begins = begun(experiment, Start.FRESH, tmp_path)
    assert same(begins.model, experiment.fresh_state(3))
    assert not same(begins.model, experiment.initial_state)  # other ones than those of round 1
    assert begins.previous is state.model
    assert replace(begins, model=state.model, previous={}) == state


def test_a_stage_may_start_from_what_it_makes_of_the_one_before(experiment: Experiment, tmp_path: Path) -> None:
    def start(previous: StateDict, fresh: StateDict) -> StateDict:
        return {name: value + 10 * fresh[name] for name, value in previous.items()}

    _, begins = begun(experiment, start, tmp_path)
    fresh = experiment.fresh_state(3)
    assert same(begins.model, {name: 2 + 10 * value for name, value in fresh.items()})


def test_a_stages_end_is_its_average_and_the_next_has_none_yet(experiment: Experiment, tmp_path: Path) -> None:
    average = filled(experiment, 5)
    _, begins = begun(experiment, Start.FRESH, tmp_path, average)
    assert begins.previous is average
    assert begins.average == {}


def test_a_stages_end_is_its_selected_model_where_one_is_selected(experiment: Experiment, tmp_path: Path) -> None:
    selected = filled(experiment, 7)
    _, begins = begun(experiment, Start.FRESH, tmp_path, filled(experiment, 5), selected)
    assert begins.previous is selected


def test_a_stage_that_continues_begins_nothing(experiment: Experiment, tmp_path: Path) -> None:
    state, begins = begun(experiment, Start.CONTINUE, tmp_path, filled(experiment, 5))
    assert begins is state


@pytest.mark.parametrize("number", [1, 2, 4])
def test_other_rounds_of_a_stage_begin_nothing(number: int, experiment: Experiment, tmp_path: Path) -> None:
    state = ServerState(number - 1, filled(experiment, 2), "")
    stages = (Stage(PHASES, rounds=2, start=Start.FRESH), Stage(PHASES, start=Start.FRESH))
    assert opened(experiment, stages, state, tmp_path).begin_stage(state, number) is state


@pytest.mark.parametrize(("start", "kept"), [(Start.FRESH, False), (Start.CONTINUE, True)])
def test_the_strategys_momentum_ends_with_its_stage(
    start: Start, kept: bool, experiment: Experiment, tmp_path: Path
) -> None:
    state = ServerState(2, filled(experiment, 2), "", MOMENTUM)
    server = opened(experiment, (Stage(PHASES, rounds=2), Stage(PHASES, start=start)), state, tmp_path)
    begins = server.begin_stage(state, 3)
    server.save(begins.next(begins.model, {}, server.recipe, moved=False), {})
    saved = load_checkpoint(tmp_path / "round_000003.ckpt").strategy
    assert ("list" in (saved.get("momentum_vector") or {})) == kept
    assert saved["server_momentum"] == 0.5


def test_clients_get_the_model_the_shared_state_and_previous_where_there_is_one(
    experiment: Experiment, tmp_path: Path
) -> None:
    first = ServerState(0, filled(experiment, 1), "")
    later = replace(first, round_number=3, previous=filled(experiment, 2), shared={"s": torch.tensor([3.0, 4.0])})
    for state, records in ((first, []), (later, ["previous"])):
        server = opened(experiment, (Stage(PHASES),), state, tmp_path)
        cohort, invitation = server.invite(state, state.round_number + 1)
        assert cohort == [0, 1, 2]
        assert invitation.audit
        assert invitation.round_number == state.round_number + 1
        assert same(invitation.model, state.model)
        assert same(invitation.previous, state.previous)
        assert same(invitation.shared, state.shared)
        messages = messages_to(cohort, {client: client + 5 for client in cohort}, invitation, "text")
        assert [message.metadata.dst_node_id for message in messages] == [5, 6, 7]
        assert len({id(message.content) for message in messages}) == 1  # one copy of the model for all
        for message in messages:
            assert set(message.content) == {"arrays", "config", "shared", *records}
            assert same(message.content.array_records["arrays"].to_torch_state_dict(), state.model)  # type: ignore[arg-type]
            assert dict(message.content.config_records["shared"]) == (
                {"s": [1.0, 2.0, 3.0, 4.0]} if state.shared else {}
            )
    assert same(messages[0].content.array_records["previous"].to_torch_state_dict(), later.previous)  # type: ignore[arg-type]


def test_nodes_behind_a_superlink_are_real() -> None:
    assert InProcessGrid().simulated
    assert FlowerGrid(LocalNodes(app, 3)).simulated
    assert not FlowerGrid(RealNodes(app, 3)).simulated


@pytest.mark.parametrize("simulated", [True, False])
def test_hidden_labels_are_for_simulations(simulated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither clients nor the server look at them where nodes are real, and every message says so."""
    asked: list[int] = []
    true, train = Federation.hidden_labels, clients.client_app.train_cohort
    audits: list[bool] = []
    made: list[type] = []

    def hidden_labels(self: Federation, client: int) -> torch.Tensor:
        asked.append(client)
        return true(self, client)

    def watching(experiment: Experiment, invitation: Invitation, *others: Any) -> Any:
        audits.extend([invitation.audit] * len(others[0]))
        return train(experiment, invitation, *others)

    def observing(*arguments: Any) -> Any:
        observers = observers_of(*arguments)
        made.extend(type(observer) for observer in observers.values())
        return observers

    monkeypatch.setattr(Federation, "hidden_labels", hidden_labels)
    monkeypatch.setattr(clients.client_app, "train_cohort", watching)
    monkeypatch.setattr(server.server, "observers_of", observing)
    labels = ("method.name=fedlabel", "method.confidence_threshold=0.1", "supervision.label_rate=0.3", "num_rounds=1")
    config = load_config([], [*TINY, *labels])
    grid = InProcessGrid(watching) if simulated else FlowerGrid(RealNodes(app, 3))
    run_federation(config, grid, tmp_path / "run")
    (row,) = read_metrics(tmp_path / "run")
    assert row["pseudo/coverage"] > 0
    assert audits == [simulated] * 3
    assert bool(set(made) & set(server.observers.TRUTH.values())) == simulated
    assert ("pseudo/accuracy" in row) == simulated
    assert bool(asked) == simulated
