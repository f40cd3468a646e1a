"""The panel of pseudo-labelled samples: what the server's copy of a client shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fedlabel
import server.observers.panel
from fedlabel.experiment import Experiment
from fedlabel.learning.client import ClientUpdate
from fedlabel.methods.batch import StateDict
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
    calls: list[tuple[int, int, ClientUpdate]] = []
    panels: list[dict[str, Any]] = []
    train = Experiment.train

    def watching(self: Experiment, client: int, state: StateDict, round_number: int, *others: Any) -> ClientUpdate:
        update = train(self, client, state, round_number, *others)
        calls.append((client, round_number, update))
        if round_number == 2 and not forgetful:
            forgetful.append(train(self, client, state, round_number, self.recipe.shared.start()))
        return update

    forgetful: list[ClientUpdate] = []
    monkeypatch.setattr(Experiment, "train", watching)
    monkeypatch.setattr(server.observers.panel, "pseudo_label_panel", lambda **shown: panels.append(shown))
    fedlabel.run([], [*TINY, f"method.name={method}", *options], name="x", out=tmp_path)
    *_, (client, round_number, again) = calls
    (once,) = (update for c, r, update in calls[:-1] if (c, r) == (client, round_number))
    assert round_number == 2
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
