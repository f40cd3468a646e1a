"""A cohort's clients, together and alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

import fedlabel.cohort
from fedlabel.cohort import ClientResult, Invitation, train_cohort
from fedlabel.config import load_config
from fedlabel.experiment import Experiment
from fedlabel.learning.client import LocalRound

TINY = (
    *("data.name=digits", "data.train_samples=80", "num_clients=4", "model.name=mlp", "model.hidden_layers=[8]"),
    *("method.name=supervised", "training.local_steps=1", "training.batch_size=4", "device=cpu"),
)
Spoil = Callable[[Sequence[LocalRound]], None]


def results_of(spoil: Spoil, monkeypatch: pytest.MonkeyPatch) -> tuple[Experiment, list[int], Callable[[], Any]]:
    """Returns an experiment, the numbers of clients that were trained together, and a round of three clients."""
    experiment, sizes, train = Experiment(load_config([], TINY)), list[int](), fedlabel.cohort.train_clients

    def watched(recipe: Any, trainer: Any, model: Any, clients: Sequence[LocalRound], number: int) -> Any:
        sizes.append(len(clients))
        spoil(clients)
        return train(recipe, trainer, model, clients, number)

    monkeypatch.setattr(fedlabel.cohort, "train_clients", watched)
    invitation = Invitation(1, experiment.initial_state, {}, {})
    return experiment, sizes, lambda: train_cohort(experiment, invitation, [0, 2, 3], [{}] * 3)


def test_a_stack_that_fails_by_itself_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def spoil(clients: Sequence[LocalRound]) -> None:
        if len(clients) > 1:
            raise RuntimeError("vmap: it looks like you're calling .item()\nand more")

    experiment, sizes, train = results_of(spoil, monkeypatch)
    with caplog.at_level("WARNING", "fedlabel"):
        assert [type(result) for result in train() + train()] == [ClientResult] * 6
    assert sizes == [3, 1, 1, 1, 1, 1, 1]
    assert not experiment.stacks
    assert caplog.text.count("cannot be stacked (RuntimeError: vmap: it looks like you're calling .item())") == 1


def test_a_client_that_fails_fails_alone_and_stacks_go_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    guilty: list[int] = []

    def spoil(clients: Sequence[LocalRound]) -> None:
        if any(client.seed in guilty for client in clients):
            raise ValueError("no label fits")

    experiment, sizes, train = results_of(spoil, monkeypatch)
    guilty.append(experiment.client_seed(2, 1))
    found = train()
    assert [type(result) for result in found] == [ClientResult, ValueError, ClientResult]
    assert [result.client for result in found if isinstance(result, ClientResult)] == [0, 3]
    assert experiment.stacks
    assert sizes == [3, 1, 1, 1]
    assert not caplog.text
