"""The panel of pseudo-labelled samples: what the server's copy of a client shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import fedlabel
import fedlabel.cohort
import fedlabel.record.figures
from fedlabel.experiment import Experiment
from fedlabel.learning.client import ClientUpdate, LocalRound, Trainer
from fedlabel.methods.batch import PseudoLabels, StateDict
from fedlabel.methods.recipe import Recipe
from server.observers.panel import _remarkable
from tests.server.observers.test_training import TINY


@pytest.mark.parametrize("method", ["fedtrinet", "fedmatch", "freematch"])
def test_the_panel_shows_what_the_client_drew(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's copy of the client trains with the same memory, helpers and shared state: same draws and labels.

    Trained as in its first round (nothing kept, shared or lent) it would show something else.
    """
    options = {
        "fedtrinet": ["method.warmup_rounds=1", "method.quality_start=0.2", "method.quality_end=0.2"],
        "fedmatch": ["method.helper_interval=2", "method.confidence_threshold=0.1"],
        "freematch": [],
    }[method]
    calls: dict[tuple[int, int], ClientUpdate] = {}
    """Seed of a client's round and number of the round -> its update."""
    again_of: list[tuple[int, ClientUpdate]] = []
    forgetful: list[ClientUpdate] = []
    panels: list[dict[str, Any]] = []
    train_again, train = Experiment.train, fedlabel.cohort.train_clients

    def watching(
        recipe: Recipe, trainer: Trainer, state: StateDict, clients: Sequence[LocalRound], number: int
    ) -> list[ClientUpdate]:
        updates = train(recipe, trainer, state, clients, number)
        calls.update({(client.seed, number): update for client, update in zip(clients, updates, strict=True)})
        return updates

    def watching_again(self: Experiment, client: int, state: StateDict, number: int, *others: Any) -> ClientUpdate:
        update = train_again(self, client, state, number, *others)
        again_of.append((self.client_seed(client, number), update))
        forgetful.append(train_again(self, client, state, number, self.recipe.shared.start()))
        assert number == 2
        return update

    monkeypatch.setattr(Experiment, "train", watching_again)
    monkeypatch.setattr(fedlabel.cohort, "train_clients", watching)
    monkeypatch.setattr(fedlabel.record.figures, "pseudo_label_panel", lambda **shown: panels.append(shown))
    fedlabel.run([], [*TINY, f"method.name={method}", *options, "grid.stack=off"], name="x", out=tmp_path)
    ((seed, again),) = again_of
    once = calls[seed, 2]
    assert again.pseudo is not None
    assert once.pseudo is not None
    assert torch.equal(again.pseudo_index, once.pseudo_index)
    for ours, theirs in zip(again.pseudo, once.pseudo, strict=True):
        assert torch.equal(ours, theirs)
    assert forgetful[0].pseudo is not None
    assert not all(torch.equal(a, b) for a, b in zip(forgetful[0].pseudo, once.pseudo, strict=True))
    (shown,) = panels
    assert shown["confidences"] == once.pseudo.confidence[:16].tolist()
    assert shown["kept"] == once.pseudo.keep[:16].tolist()
    assert shown["pseudo_names"] == [str(label) for label in once.pseudo.label[:16].tolist()]
    assert len(shown["images"]) == 16


def test_remarkable_samples_are_shown_once_as_they_were_drawn_last() -> None:
    """Sample 7 is dropped and then kept; 3 is kept and wrong; 5 is dropped; of 1 the truth is not known.

    Of the local experts' last labels (7: 0, 3: 1, 1: 2) the global model gives another one to 3.
    """
    rows = torch.tensor([7, 3, 5, 7, 1])
    pseudo = PseudoLabels(
        label=torch.tensor([1, 1, 0, 0, 2]),
        keep=torch.tensor([False, True, False, True, True]),
        from_global=torch.tensor([False, False, True, False, False]),
        confidence=torch.tensor([0.2, 0.9, 0.5, 0.6, 0.95]),
    )
    truth, global_labels = torch.tensor([0, 0, 0, 0, -1]), torch.tensor([2, 0, 0, 0, 2])
    found = {tag: places.tolist() for tag, (_, places) in _remarkable(rows, pseudo, truth, global_labels).items()}
    assert found == {
        "pseudo/samples_wrong": [1],
        "pseudo/samples_newly_kept": [3],
        "pseudo/samples_dropped": [2],
        "pseudo/samples_disputed": [1],
    }
    alone = pseudo._replace(from_global=torch.zeros(5, dtype=torch.bool))
    assert "pseudo/samples_disputed" not in _remarkable(rows, alone, truth, global_labels)
