"""The local loop: what moves, from which weights, on which samples."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from fedlabel.data.augment import AugmentConfig
from fedlabel.data.supervision import supervise
from fedlabel.methods.base import StateDict, sum_updates
from fedlabel.methods.fedlabel import FedLabel
from fedlabel.methods.supervised import Supervised
from fedlabel.seeding import torch_generator
from fedlabel.training import (
    ClientData,
    ClientUpdate,
    ImageTransform,
    Trainer,
    TrainingConfig,
    draw_batches,
    train_client,
)

CLASSES = 3
PLAIN = AugmentConfig(crop_padding=0, flip=False)
TRANSFORM = ImageTransform(torch.zeros(1, 1, 1), torch.ones(1, 1, 1), PLAIN, allow_flip=False)
CONFIG = TrainingConfig(lr=0.2, batch_size=4, local_steps=5)


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def client(n: int = 30, labeled: int = 10) -> tuple[ClientData, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    images = torch.randint(60, (n, 1, 6, 6), generator=generator, dtype=torch.uint8)
    images[torch.arange(n), 0, labels] += 120  # row y is bright: learnable
    mask = torch.arange(n) < labeled
    return ClientData(images, supervise(labels, mask, CLASSES)), labels


def train(
    method: object, data: ClientData, config: TrainingConfig = CONFIG, state: StateDict | None = None, seed: int = 7
) -> ClientUpdate:
    start = state if state is not None else net().state_dict()
    return train_client(method, Trainer(net(), net(), TRANSFORM, config), start, data, 1, seed)  # type: ignore[arg-type]


def model(update: ClientUpdate) -> StateDict:
    return update.parts["model"].state


def equal(first: StateDict, second: StateDict) -> bool:
    return all(torch.equal(first[name], second[name]) for name in second)


def test_supervised_is_plain_sgd_exactly() -> None:
    """The reference loop is torch.optim.SGD on cross_entropy over the same batches, written out."""
    data, labels = client()
    reference = net()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.2, momentum=0.9, weight_decay=0.01)
    batches = draw_batches(torch.arange(10), 4, 5, torch_generator(7, "supervised", "labeled"))
    for rows in batches:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(reference(data.images[rows].float() / 255), labels[rows]).backward()
        optimizer.step()
    update = train(Supervised(), data, replace(CONFIG, momentum=0.9, weight_decay=0.01))
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(model(update)[name], value, atol=1e-7, rtol=1e-6)
    assert update.parts["model"].weight == 20  # five steps of four


def test_hidden_labels_are_out_of_reach() -> None:
    """Hidden labels set to -1 change nothing, to the bit."""
    data, labels = client()
    poisoned = torch.where(torch.arange(len(labels)) < 10, labels, -torch.ones_like(labels))
    other = ClientData(data.images, supervise(poisoned, torch.arange(len(labels)) < 10, CLASSES))
    assert equal(model(train(FedLabel(), data)), model(train(FedLabel(), other)))


def test_check_7_without_stage_b_steps_the_round_is_supervised_fedavg_exactly() -> None:
    data, _ = client()
    assert equal(model(train(FedLabel(unlabeled_steps=0), data)), model(train(Supervised(), data)))


def test_check_7_stage_b_starts_from_the_global_weights_and_the_upload_is_the_sum() -> None:
    """With both stages, d = dL + dU, where dU does not depend on having trained dL first (teacher=global)."""
    data, _ = client()
    start = net().state_dict()
    method = FedLabel(confidence_threshold=0.0, teacher="global")
    both = model(train(method, data))
    only_a = model(train(FedLabel(unlabeled_steps=0), data))
    unlabeled = ClientData(data.images[10:], supervise(torch.zeros(20, dtype=torch.long), torch.zeros(20) > 1, CLASSES))
    only_b = model(train(method, unlabeled))
    assert not equal(only_a, start)
    assert not equal(only_b, start)
    for name, w in start.items():
        torch.testing.assert_close(both[name], w + (only_a[name] - w) + (only_b[name] - w), atol=1e-6, rtol=1e-5)


def test_check_7_received_weights_stay_as_they_are() -> None:
    data, _ = client()
    start = net().state_dict()
    before = {name: value.clone() for name, value in start.items()}
    train(FedLabel(confidence_threshold=0.0), data, state=start)
    assert equal(start, before)


def test_check_8_threshold_one_equals_supervised_with_the_same_weight() -> None:
    data, _ = client()
    nothing, supervised = train(FedLabel(confidence_threshold=1.0), data), train(Supervised(), data)
    assert equal(model(nothing), model(supervised))
    assert nothing.parts["model"].weight == supervised.parts["model"].weight == 20


def test_check_8_client_without_labels_has_two_equal_teachers() -> None:
    """w_L == w: all agree with full weight, the global model is the expert of every sample."""
    data, _ = client(labeled=0)
    update = train(FedLabel(confidence_threshold=0.0), data)
    assert update.pseudo is not None
    assert update.pseudo.from_global.all()
    assert update.sums["pseudo/agreement"] == [20, 20]
    assert not equal(model(update), net().state_dict())


def test_client_without_unlabeled_samples_is_supervised() -> None:
    data, _ = client(n=10)
    update = train(FedLabel(), data)
    assert equal(model(update), model(train(Supervised(), data)))
    assert update.pseudo is None
    assert "pseudo/coverage" not in update.sums


def test_client_with_nothing_to_learn_from_sends_what_it_got_with_weight_zero() -> None:
    data, _ = client(labeled=0)
    update = train(Supervised(), data)
    assert equal(model(update), net().state_dict())
    assert update.parts["model"].weight == 0


def test_proximal_term_adds_mu_times_distance_to_the_gradient() -> None:
    """Second step of two: p2 = p1 - lr (g + mu (p1 - p0)); the first step is the same with and without."""
    data, _ = client()
    start = net().state_dict()
    config = replace(CONFIG, local_steps=2)
    plain = model(train(Supervised(), data, config))
    proximal = model(train(Supervised(), data, replace(config, prox_mu=0.5)))
    first = model(train(Supervised(), data, replace(CONFIG, local_steps=1)))
    for name in start:
        expected = plain[name] - 0.2 * 0.5 * (first[name] - start[name])
        torch.testing.assert_close(proximal[name], expected, atol=1e-6, rtol=1e-5)
    assert not equal(plain, proximal)


def test_fedlabel_proximal_term_is_the_gradient_of_the_mean_squared_distance() -> None:
    """d/dp [mu * mean((p - p0)^2)] = 2 mu / numel * (p - p0)."""
    phase = FedLabel(prox_mu=10.0).phases(1)[1]
    assert phase.proximal is not None
    parameter = torch.randn(4, 5, requires_grad=True)
    anchor = torch.randn(4, 5)
    (10.0 * ((parameter - anchor) ** 2).mean()).backward()
    torch.testing.assert_close(parameter.grad, phase.proximal(parameter) * (parameter.detach() - anchor))


def test_steps_without_kept_samples_move_nothing_even_with_momentum_and_decay() -> None:
    data, _ = client(labeled=0)
    method = FedLabel(confidence_threshold=1.0, prox_mu=1.0)
    update = train(method, data, replace(CONFIG, momentum=0.9, weight_decay=0.1))
    assert equal(model(update), net().state_dict())


def test_steps_without_kept_samples_leave_batch_norm_alone() -> None:
    data, _ = client(labeled=0)
    normed = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))
    start = {name: value.clone() for name, value in normed.state_dict().items()}
    method = FedLabel(confidence_threshold=1.0)
    update = train_client(method, Trainer(normed, copy.deepcopy(normed), TRANSFORM, CONFIG), start, data, 1, 7)
    assert equal(model(update), start)


def test_epochs_count_the_samples_that_a_phase_draws_from() -> None:
    """10 labelled in batches of 4: 3 steps an epoch; 20 unlabelled: 5. Two epochs: 6 * 4 + 10 * (4 + 4) of the
    student, back and forth, and 10 * (4 + 4) of the two teachers, forth only (the paper's 2P + 2B and more)."""
    data, _ = client()
    update = train(FedLabel(), data, replace(CONFIG, local_steps=None, local_epochs=2))
    assert update.backward == 6 * 4 + 10 * 8
    assert update.forward == update.backward + 10 * 8


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


def test_batches_are_shuffled_passes_without_a_gap() -> None:
    batches = torch.stack(list(draw_batches(torch.arange(5, 15), 4, 5, torch_generator(0, "x"))))
    flat = batches.flatten()
    assert sorted(flat[:10].tolist()) == sorted(flat[10:].tolist()) == list(range(5, 15))
    assert flat[:10].tolist() != list(range(5, 15))
    assert [len(b) for b in draw_batches(torch.arange(3), 4, 2, torch_generator(0, "x"))] == [3, 3]
    assert [len(b) for b in draw_batches(torch.arange(0), 4, 2, torch_generator(0, "x"))] == [0, 0]


def test_dropout_is_a_function_of_the_seed_and_leaves_the_global_generator_alone() -> None:
    data, _ = client()
    dropout = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Dropout(0.5), nn.Linear(16, CLASSES))
    start = {name: value.clone() for name, value in dropout.state_dict().items()}
    updates = []
    for seed in (1, 1, 2):
        before = torch.get_rng_state()
        updates.append(train_client(Supervised(), Trainer(dropout, net(), TRANSFORM, CONFIG), start, data, 1, seed))
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(3)
    assert equal(model(updates[0]), model(updates[1]))
    assert not equal(model(updates[0]), model(updates[2]))


def test_sum_updates_averages_buffers_and_keeps_a_lone_state_exact() -> None:
    """w = 1, states 2 and 4 -> 2 + 3 = 5; buffer 10 -> mean of 12 and 16 = 14; counter from the last."""
    start = {"w": torch.tensor(1.0), "var": torch.tensor(10.0), "n": torch.tensor(0)}
    first = {"w": torch.tensor(2.0), "var": torch.tensor(12.0), "n": torch.tensor(3)}
    second = {"w": torch.tensor(4.0), "var": torch.tensor(16.0), "n": torch.tensor(5)}
    assert sum_updates(start, [first, second], frozenset({"w"})) == {"w": 5.0, "var": 14.0, "n": 5}
    assert sum_updates(start, [first], frozenset({"w"})) == first
    assert sum_updates(start, [], frozenset({"w"})) == start


def test_training_config_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"`training.lr` \(=0\) must be a positive number"):
        TrainingConfig(lr=0)
    with pytest.raises(ValueError, match="exactly one must be set"):
        TrainingConfig(local_steps=5, local_epochs=1)
    with pytest.raises(ValueError, match="exactly one must be set"):
        TrainingConfig(local_steps=None)
