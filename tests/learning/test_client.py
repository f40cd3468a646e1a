"""A client's round: phases, memory, weight in the mean; and the server's own training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import nn

from fedlabel.data.labels.supervision import reveal_labels
from fedlabel.learning.client import ClientData, Trainer, train_client, train_server
from fedlabel.learning.plan import draw_batches
from fedlabel.learning.training_config import TrainingConfig
from fedlabel.methods.batch import Batch, Model, Prepared, StateDict, Step
from fedlabel.methods.fedlabel import FedLabel
from fedlabel.methods.fixmatch import FixMatch
from fedlabel.methods.losses import labels_loss
from fedlabel.methods.recipe import Method, Phase, Update
from fedlabel.methods.supervised import Supervised
from fedlabel.seeding import torch_generator
from tests.learning.clients import (
    BOTH,
    CONFIG,
    TASK,
    TRANSFORM,
    UNLABELED,
    Made,
    client,
    noted,
    to_class,
    train,
)
from tests.methods.tables import CLASSES, model, net, same


def test_hidden_labels_are_out_of_reach() -> None:
    """Hidden labels set to -1 change nothing, to the bit."""
    data, labels = client()
    poisoned = torch.where(torch.arange(len(labels)) < 10, labels, -torch.ones_like(labels))
    other = ClientData(data.images, reveal_labels(poisoned, torch.arange(len(labels)) < 10, CLASSES))
    assert same(model(train(FedLabel(), data)), model(train(FedLabel(), other)))


def test_check_7_without_stage_b_steps_the_round_is_supervised_fedavg_exactly() -> None:
    data, _ = client()
    assert same(model(train(FedLabel(unlabeled_steps=0), data)), model(train(Supervised(), data)))


def test_check_7_stage_b_starts_from_the_global_weights_and_the_upload_is_the_sum() -> None:
    """With both stages, d = dL + dU, where dU does not depend on having trained dL first (teacher=global)."""
    data, _ = client()
    start = net().state_dict()
    method = FedLabel(confidence_threshold=0.0, teacher="global")
    both = model(train(method, data))
    only_a = model(train(FedLabel(unlabeled_steps=0), data))
    unlabeled = ClientData(
        data.images[10:], reveal_labels(torch.zeros(20, dtype=torch.long), torch.zeros(20) > 1, CLASSES)
    )
    only_b = model(train(method, unlabeled))
    assert not same(only_a, start)
    assert not same(only_b, start)
    for name, w in start.items():
        torch.testing.assert_close(both[name], w + (only_a[name] - w) + (only_b[name] - w), atol=1e-6, rtol=1e-5)


def test_check_7_received_weights_stay_as_they_are() -> None:
    data, _ = client()
    start = net().state_dict()
    before = {name: value.clone() for name, value in start.items()}
    train(FedLabel(confidence_threshold=0.0), data, state=start)
    assert same(start, before)


def test_check_8_threshold_one_equals_supervised_with_the_same_weight() -> None:
    data, _ = client()
    nothing, supervised = train(FedLabel(confidence_threshold=1.0), data), train(Supervised(), data)
    assert same(model(nothing), model(supervised))
    assert nothing.parts["model"].weight == supervised.parts["model"].weight == 20


def test_check_8_client_without_labels_has_two_equal_teachers() -> None:
    """w_L == w: all agree with full weight, the global model is the expert of every sample."""
    data, _ = client(labeled=0)
    update = train(FedLabel(confidence_threshold=0.0), data)
    assert update.pseudo is not None
    assert update.pseudo.from_global.all()
    assert update.sums["pseudo/agreement"] == [20, 20]
    assert not same(model(update), net().state_dict())


def test_client_without_unlabeled_samples_is_supervised() -> None:
    data, _ = client(n=10)
    update = train(FedLabel(), data)
    assert same(model(update), model(train(Supervised(), data)))
    assert update.pseudo is None
    assert "pseudo/coverage" not in update.sums


def test_client_with_nothing_to_learn_from_sends_what_it_got_with_weight_zero() -> None:
    data, _ = client(labeled=0)
    update = train(Supervised(), data)
    assert same(model(update), net().state_dict())
    assert update.parts["model"].weight == 0


@pytest.mark.parametrize(("weight_by", "expected"), [("processed", 20), ("size", 10), ("uniform", 1)])
def test_client_weight(weight_by: str, expected: float) -> None:
    data, _ = client()
    assert train(Supervised(), data, replace(CONFIG, weight_by=weight_by)).parts["model"].weight == expected


def test_processed_weight_of_fedlabel_counts_labeled_draws_and_kept_draws() -> None:
    data, _ = client()
    update = train(FedLabel(confidence_threshold=0.5), data)
    assert update.pseudo is not None
    assert update.parts["model"].weight == 20 + int(update.pseudo.keep.sum())
    assert len(update.pseudo.keep) == len(update.pseudo_index) == 20
    assert (update.pseudo_index >= 10).all()  # only unlabelled samples are pseudo-labelled


def test_dropout_is_a_function_of_the_seed_and_leaves_the_global_generator_alone() -> None:
    data, _ = client()
    dropout = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Dropout(0.5), nn.Linear(16, CLASSES))
    start = {name: value.clone() for name, value in dropout.state_dict().items()}
    recipe, updates = Supervised().recipe(TASK), []
    for seed in (1, 1, 2):
        before = torch.get_rng_state()
        updates.append(train_client(recipe, Trainer(dropout, net(), TRANSFORM, CONFIG), start, data, 1, seed))
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(3)
    assert same(model(updates[0]), model(updates[1]))
    assert not same(model(updates[0]), model(updates[2]))


@pytest.mark.parametrize(("includes", "expected"), [(False, 30), (True, 30)])
def test_weight_by_size_counts_a_sample_once(includes: bool, expected: int) -> None:
    """Two phases draw the ten labelled samples, one of them also the twenty others (or all thirty)."""
    data, _ = client()
    phases = (
        Phase("first", labels_loss),
        Phase("second", to_class(0), draw=BOTH),
    )
    config = replace(CONFIG, weight_by="size", unlabeled_includes_labeled=includes)
    assert train(Made(made=phases), data, config).parts["model"].weight == expected


@pytest.mark.parametrize("weight_by", ["processed", "size", "uniform"])
def test_a_client_whose_losses_used_nothing_counts_zero(weight_by: str) -> None:
    data, _ = client(labeled=0)
    config = replace(CONFIG, weight_by=weight_by)
    nothing = train(FixMatch(confidence_threshold=1.0), data, config)
    assert nothing.parts["model"].weight == 0
    assert same(model(nothing), net().state_dict())
    assert train(FixMatch(confidence_threshold=0.0), data, config).parts["model"].weight > 0


def test_a_phase_may_start_where_another_ended_and_its_update_counts_once() -> None:
    """A then B from A's end: the upload is B's end. The same phases both from the global weights: the sum."""
    data, _ = client()
    start = net().state_dict()
    loss, seen = noted(to_class(1))
    first = Phase("first", labels_loss)
    second = Phase("second", loss, draw=UNLABELED, start="first")
    chained = train(Made(made=(first, second)), data)
    after_first = model(train(Made(made=(first,)), data))
    continued = train(Made(made=(replace(second, start="global"),)), data, state=after_first)
    assert same(model(chained), model(continued))
    assert chained.parts["model"].weight == 20 + 20
    both = model(train(Made(made=(first, replace(second, start="global"))), data))
    only = model(train(Made(made=(replace(second, start="global"),)), data))
    for name, w in start.items():
        torch.testing.assert_close(both[name], after_first[name] + (only[name] - w), atol=1e-6, rtol=1e-5)
    assert not same(both, model(chained))
    assert len(seen) == 20


def test_a_phase_that_starts_from_one_that_did_not_run_starts_where_that_would_have() -> None:
    data, _ = client(labeled=0)
    phases = (
        Phase("first", labels_loss),
        Phase("second", to_class(1), draw=UNLABELED, start="first", teachers=("first",)),
    )
    chained = model(train(Made(made=phases), data))
    assert same(chained, model(train(Made(made=(replace(phases[1], start="global", teachers=()),)), data)))
    assert not same(chained, net().state_dict())


def test_a_phase_with_nothing_to_draw_does_not_run() -> None:
    data, _ = client()
    nothing = torch.zeros(30, dtype=torch.bool)
    loss, seen = noted(to_class(0))
    phase = Phase("train", loss, draw=UNLABELED, prepare=lambda survey: Prepared({}, nothing))
    update = train(Made(made=(phase,)), data)
    assert same(model(update), net().state_dict())
    assert update.parts["model"].weight == 0
    assert not seen
    train(Made(made=(replace(phase, draw=BOTH),)), data)  # labels are left
    assert {len(batch.unlabeled.candidates) for batch in seen} == {0}
    assert {len(batch.labeled.candidates) for batch in seen} == {4}


def test_memory_is_carried_over_steps_updates_and_phases() -> None:
    """Counted up in every step: 5 steps of two updates, the E step adds 100, then 5 of one update: 115.

    The shared state overrides the client's initial memory; None as a step's memory leaves it.
    """
    data, _ = client()

    def counting(student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
        step = to_class(0)(student, teachers, batch)
        return step._replace(memory={**batch.memory, "count": batch.memory["count"] + 1})

    silent, seen = noted(to_class(0))
    phases = (
        Phase("first", counting, draw=UNLABELED, then=(Update(counting), Update(silent))),
        Phase(
            "second",
            counting,
            draw=UNLABELED,
            prepare=lambda survey: Prepared({}, memory={"count": survey.memory["count"] + 100}),
        ),
    )
    method = Made(made=phases, memory={"count": torch.tensor(0.0)})
    assert train(method, data).statistics["count"].item() == 115
    assert [batch.memory["count"].item() for batch in seen] == [2, 4, 6, 8, 10]
    trainer, shared = Trainer(net(), net(), TRANSFORM, CONFIG), {"count": torch.tensor(1000.0)}
    update = train_client(method.recipe(TASK), trainer, net().state_dict(), data, 1, 7, shared)
    assert update.statistics["count"].item() == 1115
    assert shared["count"].item() == 1000


def server(method: Method, data: ClientData, config: TrainingConfig) -> StateDict:
    start = net().state_dict()
    before = {name: value.clone() for name, value in start.items()}
    trained = train_server(method.recipe(TASK), Trainer(net(), net(), TRANSFORM, config), start, data, 7)
    assert same(start, before)
    return trained


def test_the_server_trains_on_its_labels_from_the_mean() -> None:
    """The reference is torch's SGD: server_steps of server_batch_size, without the clients' proximal term."""
    data, labels = client()
    config = replace(CONFIG, server_steps=3, server_batch_size=6, prox_mu=5.0, local_steps=None, local_epochs=9)
    reference = net()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.2)
    for rows in draw_batches(torch.arange(10), 6, 3, torch_generator(7, "server", "labeled")):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(reference(data.images[rows].float() / 255), labels[rows]).backward()
        optimizer.step()
    trained = server(FixMatch(), data, config)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(trained[name], value, atol=1e-7, rtol=1e-6)


def test_the_server_trains_as_clients_do_where_nothing_else_is_said() -> None:
    data, _ = client()
    expected = server(FixMatch(), data, replace(CONFIG, server_steps=5, server_batch_size=4))
    assert same(server(FixMatch(), data, CONFIG), expected)
    assert not same(expected, net().state_dict())


def test_the_server_leaves_the_mean_as_it_is_without_steps_labels_or_phases() -> None:
    data, _ = client()
    without, _ = client(labeled=0)
    start = net().state_dict()
    assert same(server(FixMatch(), data, replace(CONFIG, server_steps=0)), start)
    assert same(server(FixMatch(), without, CONFIG), start)
    assert same(server(Made(), data, CONFIG), start)


def test_a_server_of_two_phases_ends_where_the_last_one_ends() -> None:
    data, _ = client()
    first = Phase("first", labels_loss)
    second = Phase("second", to_class(1), draw=UNLABELED, start="first")
    ended = server(Made(server=(first, second)), data, CONFIG)
    assert same(ended, model(train(Made(made=(first, second)), data)))
