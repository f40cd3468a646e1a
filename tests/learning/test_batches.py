"""What a loss sees of the samples that are drawn: no label of an unlabelled one, and the targets of its own rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from fedlabel.data.labels.supervision import Supervision
from fedlabel.learning import batches
from fedlabel.learning.client import ClientData
from fedlabel.learning.step import tensors_in
from fedlabel.methods.batch import Batch, Model, Prepared, Step, Survey
from fedlabel.methods.losses import cross_entropy_on_labels
from fedlabel.methods.recipe import BySample, Phase
from tests.learning.clients import (
    BY_KNOWLEDGE,
    CONFIG,
    MIXED,
    UNLABELED,
    Made,
    believing,
    client,
    mixed_client,
    noted,
    rows_of,
    to_class,
    train,
)
from tests.methods.tables import CLASSES, model, net, same


@pytest.mark.parametrize("includes", [False, True])
def test_labelled_samples_are_drawn_as_unlabelled_ones_without_their_label(includes: bool) -> None:
    """30 samples, 10 labelled: one pass of 5 steps of 6 draws over all of them, or one and a half over 20."""
    data, _ = client()
    loss, seen = noted(to_class(0))
    config = replace(CONFIG, batch_size=6, unlabeled_includes_labeled=includes)
    phase = Phase("train", loss, draw=MIXED)
    train(Made(made=(phase,)), data, config)
    for part in ("unlabeled", "mix"):
        drawn = [row for batch in seen for row in rows_of(getattr(batch, part).views["weak"], data)]
        assert set(drawn) == set(range(0 if includes else 10, 30))
        assert all(getattr(batch, part).candidates.all() for batch in seen)
    labeled = [row for batch in seen for row in rows_of(batch.labeled.views["weak"], data)]
    assert set(labeled) == set(range(10))
    assert all((batch.labeled.candidates.sum(1) == 1).all() for batch in seen)


def test_batches_do_not_depend_on_how_many_are_looked_up_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weak views, for which nothing is drawn, and the other fields of 5 steps of 6 samples, in three kinds."""
    data, _ = client()
    found: list[list[Batch]] = []
    for ahead in (1, 7, 512):
        monkeypatch.setattr(batches, "AHEAD", {"cpu": ahead})
        loss, seen = noted(to_class(0))
        train(Made(made=(Phase("train", loss, draw=MIXED),)), data, replace(CONFIG, batch_size=6))
        found.append(seen)
    assert len(found[0]) == 5
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            for here, there in zip(tensors_in(one), tensors_in(two), strict=True):
                assert torch.equal(here, there)


def test_a_loss_that_looks_for_labels_among_unlabelled_samples_finds_none() -> None:
    data, _ = client()

    def curious(student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
        return cross_entropy_on_labels(student, batch.unlabeled)

    phase = Phase("train", curious, draw=UNLABELED)
    update = train(Made(made=(phase,)), data, replace(CONFIG, unlabeled_includes_labeled=True, batch_size=30))
    assert same(model(update), net().state_dict())
    assert update.parts["model"].weight == 0


def test_unlabelled_samples_keep_the_classes_that_they_may_have() -> None:
    """Sample 0 is labelled, 1 is one of two classes, nothing is known of 2."""
    sets = torch.tensor([[True, False, False], [True, False, True], [True, True, True]])
    data = ClientData(client(n=3)[0].images, Supervision.certain(sets))
    loss, seen = noted(to_class(0))
    phase = Phase("train", loss, draw=UNLABELED)
    train(Made(made=(phase,)), data, replace(CONFIG, unlabeled_includes_labeled=True, local_steps=1))
    (batch,) = seen
    order = rows_of(batch.unlabeled.views["weak"], data)
    expected = torch.tensor([[True, True, True], [True, False, True], [True, True, True]])
    assert torch.equal(batch.unlabeled.candidates, expected[order])


@pytest.mark.parametrize("includes", [False, True])
def test_unlabelled_parts_of_a_phase_by_knowledge_show_nothing(includes: bool) -> None:
    loss, seen = noted(believing)
    phase = Phase("train", loss, draw=BY_KNOWLEDGE)
    train(Made(made=(phase,)), mixed_client(), replace(CONFIG, batch_size=30, unlabeled_includes_labeled=includes))
    for batch in seen:
        drawn = batch.unlabeled
        assert len(drawn.rows) == (30 if includes else 5)
        assert drawn.candidates.all()
        assert not drawn.noisy.any()
        assert (drawn.annotations == -1).all()


def test_unlabelled_parts_of_other_phases_hide_what_stands_for_a_label() -> None:
    """Sets and annotators are no label: they stay in sight; a label, noisy or not, goes with all that is with it."""
    data = mixed_client()
    loss, seen = noted(to_class(0))
    phase = Phase("train", loss, draw=UNLABELED)
    train(Made(made=(phase,)), data, replace(CONFIG, batch_size=30, local_steps=1, unlabeled_includes_labeled=True))
    (batch,) = seen
    part, order = batch.unlabeled, batch.unlabeled.rows
    hidden = data.supervision.labeled[order]
    assert part.candidates[hidden].all()
    assert (part.annotations[hidden] == -1).all()
    assert not part.noisy.any()
    kept = data.supervision.rows(order[~hidden])
    assert torch.equal(part.candidates[~hidden], kept.candidates)
    assert torch.equal(part.annotations[~hidden], kept.annotations)


def test_targets_of_the_e_step_reach_the_rows_that_they_are_of() -> None:
    """`prepare` sees all samples in order, with the received weights; each part gets the rows of its own samples."""
    data, _ = client()
    loss, seen = noted(to_class(0))

    def prepare(survey: Survey) -> Prepared:
        with torch.no_grad():
            expected = net()(data.images.float() / 255)
        logits = survey.predict("global", "clean")
        torch.testing.assert_close(logits, expected)
        assert torch.equal(survey.supervision.candidates, data.supervision.candidates)
        return Prepared({"row": torch.arange(30), "logits": logits})

    draw = BySample(("weak",), ("weak", "strong"), ("weak",))
    phase = Phase("train", loss, draw, teachers=("global",), prepare=prepare)
    train(Made(made=(phase,)), data)
    for batch in seen:
        for part in (batch.labeled, batch.unlabeled, batch.mix):
            assert part.targets["row"].tolist() == rows_of(part.views["weak"], data)
            assert part.targets["logits"].shape == (4, CLASSES)
    assert {row for batch in seen for row in batch.mix.targets["row"].tolist()} <= set(range(10, 30))
