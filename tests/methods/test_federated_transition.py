"""What each form of the noise matrix shares, sends and keeps; for its numbers see `test_ill.py`, `test_forward.py`."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from fedlabel.inference.transition import diagonal_transition
from fedlabel.methods.federated_transition import NoiseMatrix, noise_matrix
from fedlabel.methods.shared import Limits

START = diagonal_transition(3, 0.3)


class Names(NamedTuple):
    """What there is of a form, by name."""

    shared: set[str]
    broadcast: set[str]
    statistics: set[str]
    kept: set[str]
    shown: set[str]


T, LOGITS = {"transition"}, {"logits"}
COUNTED, PICTURE, NONE = {"transition", "counts", "rounds"}, {"noise_matrix"}, set[str]()
FORMS = {
    ("closed", "global"): Names(COUNTED, T, {"counts"}, NONE, PICTURE),
    ("closed", "prior"): Names(COUNTED, T, {"counts"}, {"own_transition"}, PICTURE),
    ("closed", "client"): Names(T, T, NONE, {"own_transition"}, NONE),
    ("gradient", "global"): Names(LOGITS, LOGITS, {"logits", "noisy_samples"}, NONE, PICTURE),
    ("gradient", "client"): Names(NONE, NONE, NONE, {"own_logits"}, NONE),
    ("fixed", "global"): Names(T, T, NONE, NONE, PICTURE),
    ("fixed", "client"): Names(T, T, NONE, NONE, NONE),
}


@pytest.mark.parametrize(("form", "scope"), FORMS)
def test_what_is_shared_sent_kept_and_shown(form: str, scope: str) -> None:
    """After a round in which a client learnt, from one sample with label 1 that is certainly of class 0."""
    noise, names = NoiseMatrix(form=form, scope=scope), FORMS[form, scope]
    closed_form = noise.shared(3, 1, None)
    shared = closed_form.start()
    sent = closed_form.broadcast(shared)
    assert (shared.keys(), sent.keys()) == (names.shared, names.broadcast)
    memory = {**noise.memory(torch.ones(5, 3, dtype=torch.bool)), **sent}
    torch.testing.assert_close(noise.matrices(memory), START[None])
    like = noise.like(memory, {})
    counts = torch.tensor([[[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    if form == "closed":
        assert noise.keep(noise.counted(memory, counts, learn=False), []) == {}  # the warm-up
        memory = noise.counted(memory, counts, learn=True)
    elif form == "gradient":
        memory = noise.stepped(memory, counts, torch.tensor(1))
    kept = noise.keep(memory, [])
    assert (kept.keys(), like.keys()) == (names.kept, names.kept)
    assert all(kept[name].shape == like[name].shape for name in kept)
    statistics = closed_form.statistics(memory)
    assert statistics.keys() == names.statistics
    if "counts" in statistics:
        assert torch.equal(statistics["counts"], counts)
    closed_form.check_statistics(statistics, shared, Limits(samples=1, annotators=0, steps=1, examples=1))
    closed_form.check(shared)
    assert noise.inspect(shared).keys() == names.shown
    assert closed_form.update(shared, {}) is shared


@pytest.mark.parametrize(("form", "scope"), [("closed", "global"), ("closed", "client"), ("fixed", "global")])
def test_rows_that_are_no_distributions_are_refused(form: str, scope: str) -> None:
    closed_form = NoiseMatrix(form=form, scope=scope).shared(3, 1, None)
    with pytest.raises(ValueError, match="transition must be probabilities"):
        closed_form.check({**closed_form.start(), "transition": 2 * START[None]})


def test_one_matrix_is_shown_as_several_are() -> None:
    assert torch.equal(noise_matrix({"transition": START})["noise_matrix"], START[None])
    several = torch.stack([START, torch.eye(3)])
    assert torch.equal(noise_matrix({"transition": several})["noise_matrix"], several)
    torch.testing.assert_close(noise_matrix({"logits": several.log()})["noise_matrix"], several)
