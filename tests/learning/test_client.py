"""The local loop: what moves, from which weights, on which samples."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from fedlabel.batches import draw_batches
from fedlabel.methods.base import Method, Phase, Prepared, Survey, Update, sum_updates
from fedlabel.methods.steps import (
    Batch,
    LossFunction,
    Model,
    PseudoLabels,
    State,
    StateDict,
    Step,
    cross_entropy_on_labels,
)
from torch import Tensor, nn

from fedlabel.data.augment import AugmentConfig
from fedlabel.data.labels.supervision import Supervision, supervise
from fedlabel.learning.client import ClientData, ClientUpdate, ImageTransform, Trainer, train_client, train_server
from fedlabel.learning.training_config import TrainingConfig
from fedlabel.methods import METHODS
from fedlabel.methods.fedlabel import FedLabel
from fedlabel.methods.fixmatch import FixMatch
from fedlabel.methods.supervised import Supervised
from fedlabel.seeding import torch_generator
from tests.methods.test_contract import LATE, make, make_student

CLASSES = 3
PLAIN = AugmentConfig(crop_padding=0, flip=False)
TRANSFORM = ImageTransform(torch.zeros(1, 1, 1), torch.ones(1, 1, 1), PLAIN, allow_flip=False)
CONFIG = TrainingConfig(lr=0.2, batch_size=4, local_steps=5)


def net() -> nn.Sequential:
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


def test_weak_views_can_be_strong_ones() -> None:
    images = torch.randint(256, (8, 1, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def view(name: str, weak_as_strong: bool) -> torch.Tensor:
        config = AugmentConfig(num_ops=2, cutout=0.5, weak_as_strong=weak_as_strong)
        transform = ImageTransform(torch.zeros(1, 1, 1), torch.ones(1, 1, 1), config, False)
        return transform.views(images, (name,), torch.Generator().manual_seed(1))[name]

    assert torch.equal(view("weak", True), view("strong", False))
    assert not torch.equal(view("weak", False), view("strong", False))
    assert torch.equal(view("clean", True), view("clean", False))


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


def test_adamw_is_torchs() -> None:
    """The same loop with torch.optim.AdamW."""
    data, labels = client()
    reference = net()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=0.01, weight_decay=0.1)
    for rows in draw_batches(torch.arange(10), 4, 5, torch_generator(7, "supervised", "labeled")):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(reference(data.images[rows].float() / 255), labels[rows]).backward()
        optimizer.step()
    config = replace(CONFIG, optimizer="adamw", lr=0.01, momentum=0.0, weight_decay=0.1)
    update = train(Supervised(), data, config)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(model(update)[name], value, atol=1e-7, rtol=1e-6)


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
    config = replace(CONFIG, local_steps=None, local_epochs=2)
    update = train(FedLabel(confidence_threshold=0.0), data, config)
    assert update.backward == 6 * 4 + 10 * 8
    assert update.forward == update.backward + 10 * 8
    nothing = train(FedLabel(confidence_threshold=1.0), data, config)  # nothing is kept: stage B only looks
    assert nothing.backward == 6 * 4
    assert nothing.forward == update.forward


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


# Phases made up for the purpose: what they see, what they move.


@dataclass(frozen=True)
class Made(Method):
    """A method of the phases it is given; losses may keep notes, which no real method's does."""

    made: tuple[Phase, ...] = ()
    memory: State = field(default_factory=dict)
    server: tuple[Phase, ...] = ()

    def phases(self, round_number: int) -> tuple[Phase, ...]:
        return self.made

    def server_phases(self, round_number: int) -> tuple[Phase, ...]:
        return self.server

    def initial_memory(self, candidates: Tensor) -> State:
        return dict(self.memory)

    def statistics(self, memory: State) -> State:
        return memory


def on_labels(student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
    return cross_entropy_on_labels(student, batch.labeled)


def to_class(target: int) -> LossFunction:
    """Pulls every unlabelled sample to one class."""

    def loss(student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
        images = batch.unlabeled.views["weak"]
        return Step(
            -student(images).log_softmax(-1)[:, target].sum() / max(len(images), 1), {}, torch.tensor(len(images))
        )

    return loss


def noted(loss: LossFunction) -> tuple[LossFunction, list[Batch]]:
    """The loss, and the batches that it will have seen."""
    seen: list[Batch] = []

    def watched(student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
        seen.append(batch)
        return loss(student, teachers, batch)

    return watched, seen


def distance(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    return sum((first[name] - second[name]).square().sum().item() for name in second) ** 0.5


def rows_of(views: Tensor, data: ClientData) -> list[int]:
    """The positions of plain views in the client's data."""
    every = data.images.float() / 255
    return [int((every == view).flatten(1).all(1).nonzero().item()) for view in views]


@pytest.mark.parametrize(("ratio", "labeled", "expected"), [(1, 10, 4), (3, 10, 12), (3, 2, 12), (9, 10, 20)])
def test_unlabeled_ratio_multiplies_the_unlabelled_batch_only(ratio: int, labeled: int, expected: int) -> None:
    """Batches of 4 labelled and ratio * 4 unlabelled samples; who has fewer gives all: 2 labels; 20 unlabelled."""
    data, _ = client(n=20 + labeled, labeled=labeled)
    loss, seen = noted(to_class(0))
    phase = Phase("train", loss, labeled=("weak",), unlabeled=("weak",), mix=("weak",))
    train(Made(made=(phase,)), data, replace(CONFIG, unlabeled_ratio=ratio))
    assert {len(batch.labeled.candidates) for batch in seen} == {min(4, labeled)}
    assert {len(batch.unlabeled.candidates) for batch in seen} == {expected}
    assert {len(batch.mix.candidates) for batch in seen} == {expected}
    assert len(seen) == 5


def test_epochs_are_passes_over_the_unlabelled_samples_at_their_batch_size() -> None:
    """20 unlabelled samples, 3 * 4 a step: ceil(20 / 12) = 2 steps an epoch. Labels alone: ceil(10 / 4) = 3."""
    data, _ = client()
    config = replace(CONFIG, unlabeled_ratio=3, local_steps=None, local_epochs=2)
    both, labels = noted(to_class(0)), noted(on_labels)
    phases = (
        Phase("both", both[0], labeled=("weak",), unlabeled=("weak",)),
        Phase("labels", labels[0], labeled=("weak",)),
    )
    train(Made(made=phases), data, config)
    assert len(both[1]) == 4
    assert len(labels[1]) == 6


def test_one_unknown_sample_does_not_end_an_epoch_over_the_known_ones() -> None:
    """29 samples with labels and one of which nothing is known: ceil(29 / 4) = 8 steps; 29 unknown, 12 a step: 3."""
    for known, steps in ((29, 8), (1, 3)):
        data, _ = client(n=30, labeled=known)
        loss, calls = noted(to_class(0))
        phase = Phase("both", loss, labeled=("weak",), unlabeled=("weak",), informed=True)
        train(Made(made=(phase,)), data, replace(CONFIG, unlabeled_ratio=3, local_steps=None, local_epochs=1))
        assert len(calls) == steps


@pytest.mark.parametrize("includes", [False, True])
def test_labelled_samples_are_drawn_as_unlabelled_ones_without_their_label(includes: bool) -> None:
    """30 samples, 10 labelled: one pass of 5 steps of 6 draws over all of them, or one and a half over 20."""
    data, _ = client()
    loss, seen = noted(to_class(0))
    config = replace(CONFIG, batch_size=6, unlabeled_includes_labeled=includes)
    phase = Phase("train", loss, labeled=("weak",), unlabeled=("weak",), mix=("weak",))
    train(Made(made=(phase,)), data, config)
    for part in ("unlabeled", "mix"):
        drawn = [row for batch in seen for row in rows_of(getattr(batch, part).views["weak"], data)]
        assert set(drawn) == set(range(0 if includes else 10, 30))
        assert all(getattr(batch, part).candidates.all() for batch in seen)
    labeled = [row for batch in seen for row in rows_of(batch.labeled.views["weak"], data)]
    assert set(labeled) == set(range(10))
    assert all((batch.labeled.candidates.sum(1) == 1).all() for batch in seen)


def test_a_loss_that_looks_for_labels_among_unlabelled_samples_finds_none() -> None:
    data, _ = client()

    def curious(student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
        return cross_entropy_on_labels(student, batch.unlabeled)

    phase = Phase("train", curious, unlabeled=("weak",))
    update = train(Made(made=(phase,)), data, replace(CONFIG, unlabeled_includes_labeled=True, batch_size=30))
    assert equal(model(update), net().state_dict())
    assert update.parts["model"].weight == 0


def test_unlabelled_samples_keep_the_classes_that_they_may_have() -> None:
    """Sample 0 is labelled, 1 is one of two classes, nothing is known of 2."""
    sets = torch.tensor([[True, False, False], [True, False, True], [True, True, True]])
    data = ClientData(client(n=3)[0].images, Supervision.certain(sets))
    loss, seen = noted(to_class(0))
    phase = Phase("train", loss, unlabeled=("weak",))
    train(Made(made=(phase,)), data, replace(CONFIG, unlabeled_includes_labeled=True, local_steps=1))
    (batch,) = seen
    order = rows_of(batch.unlabeled.views["weak"], data)
    expected = torch.tensor([[True, True, True], [True, False, True], [True, True, True]])
    assert torch.equal(batch.unlabeled.candidates, expected[order])


# Phases that go by what is known, whatever it is.


def mixed_client() -> ClientData:
    """30 samples, five of each: a label, a set, a noisy label, annotators, nothing, a label and annotators."""
    images, truth = client()[0].images, torch.arange(30) % CLASSES
    kind = torch.arange(30) // 5
    candidates = torch.ones(30, CLASSES, dtype=torch.bool)
    single = (kind == 0) | (kind == 2) | (kind == 5)
    candidates[single] = (truth[:, None] == torch.arange(CLASSES))[single]
    candidates[kind == 1] = (truth[:, None] != torch.arange(CLASSES))[kind == 1]
    annotations = torch.full((30, 2), -1)
    annotations[(kind == 3) | (kind == 5), 1] = 2
    return ClientData(images, Supervision.without_bags(candidates, kind == 2, annotations))


CERTAIN = set(range(5)) | set(range(25, 30))
KNOWN = set(range(30)) - set(range(20, 25))


def believing(student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
    """Uses all samples, and believes of each that its class is its position in the client's data."""
    drawn = torch.cat([batch.labeled.rows, batch.unlabeled.rows])
    views = torch.cat([batch.labeled.views["weak"], batch.unlabeled.views["weak"]])
    loss = student(views).square().mean()
    true = torch.ones_like(drawn).bool()
    return Step(loss, {}, torch.tensor(len(drawn)), PseudoLabels(drawn, true, true, drawn / 30))


@pytest.mark.parametrize("informed", [False, True])
@pytest.mark.parametrize("includes", [False, True])
def test_which_samples_are_the_labelled_ones(informed: bool, includes: bool) -> None:
    data = mixed_client()
    loss, seen = noted(to_class(0))
    phase = Phase("train", loss, labeled=("weak",), unlabeled=("weak",), mix=("weak",), informed=informed)
    config = replace(CONFIG, batch_size=25, local_steps=3, unlabeled_includes_labeled=includes)
    train(Made(made=(phase,)), data, config)
    labeled = KNOWN if informed else CERTAIN | set(range(10, 15))
    everyone = set(range(30))
    assert {row for batch in seen for row in batch.labeled.rows.tolist()} == labeled
    for part in ("unlabeled", "mix"):
        rows = {row for batch in seen for row in getattr(batch, part).rows.tolist()}
        assert rows == (everyone if includes else everyone - labeled)
    for batch in seen:  # the labelled part shows all that is known of its samples
        known = data.supervision.rows(batch.labeled.rows)
        assert torch.equal(batch.labeled.candidates, known.candidates)
        assert torch.equal(batch.labeled.noisy, known.noisy)
        assert torch.equal(batch.labeled.annotations, known.annotations)
        assert rows_of(batch.labeled.views["weak"], data) == batch.labeled.rows.tolist()


@pytest.mark.parametrize("includes", [False, True])
def test_unlabelled_parts_of_an_informed_phase_show_nothing(includes: bool) -> None:
    loss, seen = noted(believing)
    phase = Phase("train", loss, labeled=("weak",), unlabeled=("weak",), mix=("weak",), informed=True)
    train(Made(made=(phase,)), mixed_client(), replace(CONFIG, batch_size=30, unlabeled_includes_labeled=includes))
    for part in ("unlabeled", "mix"):
        for batch in seen:
            drawn = getattr(batch, part)
            assert len(drawn.rows) == (30 if includes else 5)
            assert drawn.candidates.all()
            assert not drawn.noisy.any()
            assert (drawn.annotations == -1).all()


def test_unlabelled_parts_of_other_phases_hide_what_stands_for_a_label() -> None:
    """Sets and annotators are no label: they stay in sight; a label, noisy or not, goes with all that is with it."""
    data = mixed_client()
    loss, seen = noted(to_class(0))
    phase = Phase("train", loss, unlabeled=("weak",))
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


@pytest.mark.parametrize("includes", [False, True])
def test_pseudo_labels_of_certain_labels_are_not_counted(includes: bool) -> None:
    """Of an informed phase's samples all are believed something of; where the label is certain that is no news, and
    what is believed of a known sample that is drawn without what is known of it is not counted."""
    phase = Phase("train", believing, labeled=("weak",), unlabeled=("weak",), informed=True)
    config = replace(CONFIG, batch_size=30, local_steps=2, unlabeled_includes_labeled=includes)
    update = train(Made(made=(phase,)), mixed_client(), config)
    assert update.pseudo is not None
    rows = update.pseudo_index
    assert torch.equal(update.pseudo.label, rows)  # each belief stands beside its own sample
    assert torch.equal(update.pseudo.confidence, rows / 30)
    counts = torch.bincount(rows, minlength=30).tolist()
    each = {row: 0 if row in CERTAIN else 2 for row in range(30)}
    assert counts == list(each.values())
    assert update.parts["model"].weight == 2 * (25 + (30 if includes else 5))


def test_a_client_that_is_told_everything_for_certain_has_no_pseudo_labels() -> None:
    data, _ = client(n=10)
    phase = Phase("train", believing, labeled=("weak",), unlabeled=("weak",), informed=True)
    update = train(Made(made=(phase,)), data)
    assert len(update.pseudo_index) == 0
    assert update.pseudo is None or len(update.pseudo.label) == 0


@pytest.mark.parametrize(("includes", "expected"), [(False, 30), (True, 30)])
def test_weight_by_size_counts_a_sample_once(includes: bool, expected: int) -> None:
    """Two phases draw the ten labelled samples, one of them also the twenty others (or all thirty)."""
    data, _ = client()
    phases = (
        Phase("first", on_labels, labeled=("weak",)),
        Phase("second", to_class(0), labeled=("weak",), unlabeled=("weak",)),
    )
    config = replace(CONFIG, weight_by="size", unlabeled_includes_labeled=includes)
    assert train(Made(made=phases), data, config).parts["model"].weight == expected


@pytest.mark.parametrize("weight_by", ["processed", "size", "uniform"])
def test_a_client_whose_losses_used_nothing_counts_zero(weight_by: str) -> None:
    data, _ = client(labeled=0)
    config = replace(CONFIG, weight_by=weight_by)
    nothing = train(FixMatch(confidence_threshold=1.0), data, config)
    assert nothing.parts["model"].weight == 0
    assert equal(model(nothing), net().state_dict())
    assert train(FixMatch(confidence_threshold=0.0), data, config).parts["model"].weight > 0


def test_nesterov_is_torchs() -> None:
    data, labels = client()
    reference = net()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.2, momentum=0.9, nesterov=True)
    for rows in draw_batches(torch.arange(10), 4, 5, torch_generator(7, "supervised", "labeled")):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(reference(data.images[rows].float() / 255), labels[rows]).backward()
        optimizer.step()
    config = replace(CONFIG, momentum=0.9)
    update = train(Supervised(), data, replace(config, nesterov=True))
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(model(update)[name], value, atol=1e-7, rtol=1e-6)
    assert not equal(model(update), model(train(Supervised(), data, config)))


def test_gradient_norm_is_cut_over_all_parameters_together() -> None:
    """One step of plain SGD moves by lr * gradient: with the cut by lr * .01 exactly, in the same direction."""
    data, _ = client()
    start = net().state_dict()
    one = replace(CONFIG, local_steps=1)
    free, cut = (model(train(Supervised(), data, replace(one, max_grad_norm=norm))) for norm in (None, 0.01))
    length = distance(free, start)
    assert length > 0.2 * 0.01
    assert distance(cut, start) == pytest.approx(0.2 * 0.01, rel=1e-3)
    for name, value in start.items():
        torch.testing.assert_close(
            (cut[name] - value) * length / (0.2 * 0.01), free[name] - value, atol=1e-4, rtol=1e-2
        )
    loose = model(train(Supervised(), data, replace(one, max_grad_norm=1e6)))
    assert equal(loose, free)


def test_gradient_norm_is_cut_with_the_proximal_pull_in_it_in_every_step() -> None:
    """After k steps nothing can be further away than k * lr * max_grad_norm, however strong the pull."""
    data, _ = client()
    update = train(Supervised(), data, replace(CONFIG, max_grad_norm=0.01, prox_mu=1e4))
    assert 0 < distance(model(update), net().state_dict()) <= 5 * 0.2 * 0.01 * (1 + 1e-4)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_prox_mu_holds_every_method_near_the_global_weights(name: str) -> None:
    """The same round with and without the term; lr * mu = .4 a step is far from overshooting."""
    labels = torch.arange(16) % 4
    images = torch.randint(256, (16, 1, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = ClientData(images, supervise(labels, torch.arange(16) < 8, 4))
    method, start = make(name), make_student(name).state_dict()
    far, near = (
        train_client(
            method,
            Trainer(make_student(name, 5), make_student(name, 6), TRANSFORM, TrainingConfig(lr=0.05, prox_mu=mu)),
            start,
            data,
            LATE,
            3,
            {**method.initial_shared(4)},
            {"previous": start},
        )
        for mu in (0.0, 8.0)
    )
    for part, uploaded in far.parts.items():
        assert 0 < distance(near.parts[part].state, start) < 0.8 * distance(uploaded.state, start)


def test_a_phase_may_start_where_another_ended_and_its_update_counts_once() -> None:
    """A then B from A's end: the upload is B's end. The same phases both from the global weights: the sum."""
    data, _ = client()
    start = net().state_dict()
    loss, seen = noted(to_class(1))
    first = Phase("first", on_labels, labeled=("weak",))
    second = Phase("second", loss, unlabeled=("weak",), start="first")
    chained = train(Made(made=(first, second)), data)
    after_first = model(train(Made(made=(first,)), data))
    continued = train(Made(made=(replace(second, start="global"),)), data, state=after_first)
    assert equal(model(chained), model(continued))
    assert chained.parts["model"].weight == 20 + 20
    both = model(train(Made(made=(first, replace(second, start="global"))), data))
    only = model(train(Made(made=(replace(second, start="global"),)), data))
    for name, w in start.items():
        torch.testing.assert_close(both[name], after_first[name] + (only[name] - w), atol=1e-6, rtol=1e-5)
    assert not equal(both, model(chained))
    assert len(seen) == 20


def test_a_phase_that_starts_from_one_that_did_not_run_starts_where_that_would_have() -> None:
    data, _ = client(labeled=0)
    phases = (
        Phase("first", on_labels, labeled=("weak",)),
        Phase("second", to_class(1), unlabeled=("weak",), start="first", teachers=("first",)),
    )
    chained = model(train(Made(made=phases), data))
    assert equal(chained, model(train(Made(made=(replace(phases[1], start="global", teachers=()),)), data)))
    assert not equal(chained, net().state_dict())


def test_only_the_parameters_of_an_update_move() -> None:
    """Momentum, decay and the proximal pull spare the others, too; afterwards all can be trained again."""
    data, _ = client()
    config = replace(CONFIG, momentum=0.9, weight_decay=0.1, prox_mu=0.1)

    def last(names: Sequence[str]) -> list[str]:
        assert list(names) == ["1.weight", "1.bias", "3.weight", "3.bias"]
        return [name for name in names if name.startswith("3.")]

    start = net().state_dict()
    update = model(train(Made(made=(Phase("train", on_labels, labeled=("weak",), trains=last),)), data, config))
    for name, value in start.items():
        assert torch.equal(update[name], value) == (not name.startswith("3.")), name
    phases = (
        Phase("head", on_labels, labeled=("weak",), trains=last),
        Phase("all", on_labels, labeled=("weak",), start="head"),
    )
    update = model(train(Made(made=phases), data, config))
    assert not any(torch.equal(update[name], value) for name, value in start.items())
    student = net()
    train_client(Made(made=phases[:1]), Trainer(student, net(), TRANSFORM, config), start, data, 1, 7)
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_a_second_optimiser_step_sees_what_the_first_did() -> None:
    """One batch, step A on the last layer, then step B on the first: written out with two torch optimisers."""
    data, _ = client()
    images = data.images.float() / 255
    phase = Phase(
        "train",
        to_class(0),
        unlabeled=("weak",),
        trains=lambda names: [name for name in names if name.startswith("3.")],
        then=(Update(to_class(1), trains=lambda names: [name for name in names if name.startswith("1.")]),),
    )
    update = train(Made(made=(phase,)), data, replace(CONFIG, local_steps=3, momentum=0.9))
    reference = net()
    optimizers = [torch.optim.SGD(layer.parameters(), 0.2, momentum=0.9) for layer in (reference[3], reference[1])]
    for rows in draw_batches(torch.arange(10, 30), 4, 3, torch_generator(7, "train", "unlabeled")):
        for target, optimizer in enumerate(optimizers):
            reference.zero_grad()
            labels = torch.full((4,), target)
            torch.nn.functional.cross_entropy(reference(images[rows]), labels).backward()
            optimizer.step()
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(model(update)[name], value, atol=1e-6, rtol=1e-5)
    assert update.parts["model"].weight == 2 * 3 * 4


def test_a_penalty_is_added_to_the_loss_of_its_step_alone() -> None:
    """Step B's loss is flat; its penalty |w|^2 / 2 of the last bias moves that by -lr * w, after step A."""
    data, _ = client()

    def flat(student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
        images = batch.unlabeled.views["weak"]
        return Step(0.0 * student(images).sum(), {}, torch.tensor(len(images)))

    def penalty(named: Mapping[str, Tensor]) -> Tensor:
        return named["3.bias"].square().sum() / 2

    phase = Phase("train", to_class(0), unlabeled=("weak",), then=(Update(flat, penalty=penalty),))
    one = replace(CONFIG, local_steps=1)
    with_penalty, without = (model(train(Made(made=(p,)), data, one)) for p in (phase, replace(phase, then=())))
    torch.testing.assert_close(with_penalty["3.bias"], 0.8 * without["3.bias"])
    assert all(torch.equal(with_penalty[name], without[name]) for name in without if name != "3.bias")


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

    phase = Phase("train", loss, ("weak",), ("weak", "strong"), teachers=("global",), prepare=prepare, mix=("weak",))
    train(Made(made=(phase,)), data)
    for batch in seen:
        for part in (batch.labeled, batch.unlabeled, batch.mix):
            assert part.targets["row"].tolist() == rows_of(part.views["weak"], data)
            assert part.targets["logits"].shape == (4, CLASSES)
    assert {row for batch in seen for row in batch.mix.targets["row"].tolist()} <= set(range(10, 30))


def test_draw_restricts_the_unlabelled_draws_but_not_those_to_mix_with() -> None:
    """Samples 5 (labelled), 12 and 20 are to be drawn: two unlabelled ones; the mix comes from all twenty."""
    data, _ = client()
    loss, seen = noted(to_class(0))
    wanted = torch.isin(torch.arange(30), torch.tensor([5, 12, 20]))
    believed = PseudoLabels(torch.arange(30) % 3, wanted, wanted, torch.linspace(0, 1, 30))
    phase = Phase(
        "train",
        loss,
        unlabeled=("weak",),
        prepare=lambda survey: Prepared({}, wanted, pseudo=believed),
        mix=("weak",),
        mix_alpha=0.75,
    )
    update = train(Made(made=(phase,)), data, replace(CONFIG, local_steps=12))
    drawn = [rows_of(batch.unlabeled.views["weak"], data) for batch in seen]
    assert {row for rows in drawn for row in rows} == {12, 20}
    mixed = [rows_of(batch.mix.views["weak"], data) for batch in seen]
    assert {len(rows) for rows in mixed} == {2}  # as many as drawn
    assert {row for rows in mixed for row in rows} == set(range(10, 30))
    shares = [batch.mixing.item() for batch in seen]
    assert all(0 <= share <= 1 for share in shares)
    assert len(set(shares)) == 12
    assert update.pseudo is not None
    assert update.pseudo_index.tolist() == list(range(10, 30))
    assert torch.equal(update.pseudo.label, believed.label[10:])
    assert update.sums["pseudo/coverage"] == [2, 20]


def test_a_phase_with_nothing_to_draw_does_not_run() -> None:
    data, _ = client()
    nothing = torch.zeros(30, dtype=torch.bool)
    loss, seen = noted(to_class(0))
    phase = Phase("train", loss, unlabeled=("weak",), prepare=lambda survey: Prepared({}, nothing))
    update = train(Made(made=(phase,)), data)
    assert equal(model(update), net().state_dict())
    assert update.parts["model"].weight == 0
    assert not seen
    train(Made(made=(replace(phase, labeled=("weak",)),)), data)  # labels are left
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
        Phase("first", counting, unlabeled=("weak",), then=(Update(counting), Update(silent))),
        Phase(
            "second",
            counting,
            unlabeled=("weak",),
            prepare=lambda survey: Prepared({}, memory={"count": survey.memory["count"] + 100}),
        ),
    )
    method = Made(made=phases, memory={"count": torch.tensor(0.0)})
    assert train(method, data).statistics["count"].item() == 115
    assert [batch.memory["count"].item() for batch in seen] == [2, 4, 6, 8, 10]
    trainer, shared = Trainer(net(), net(), TRANSFORM, CONFIG), {"count": torch.tensor(1000.0)}
    assert train_client(method, trainer, net().state_dict(), data, 1, 7, shared).statistics["count"].item() == 1115
    assert shared["count"].item() == 1000


def server(method: Method, data: ClientData, config: TrainingConfig) -> StateDict:
    start = net().state_dict()
    before = {name: value.clone() for name, value in start.items()}
    trained = train_server(method, Trainer(net(), net(), TRANSFORM, config), start, data, 1, 7)
    assert equal(start, before)
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
    assert equal(server(FixMatch(), data, CONFIG), expected)
    assert not equal(expected, net().state_dict())


def test_the_server_leaves_the_mean_as_it_is_without_steps_labels_or_phases() -> None:
    data, _ = client()
    without, _ = client(labeled=0)
    start = net().state_dict()
    assert equal(server(FixMatch(), data, replace(CONFIG, server_steps=0)), start)
    assert equal(server(FixMatch(), without, CONFIG), start)
    assert equal(server(Made(), data, CONFIG), start)


def test_a_server_of_two_phases_ends_where_the_last_one_ends() -> None:
    data, _ = client()
    first = Phase("first", on_labels, labeled=("weak",))
    second = Phase("second", to_class(1), unlabeled=("weak",), start="first")
    ended = server(Made(server=(first, second)), data, CONFIG)
    assert equal(ended, model(train(Made(made=(first, second)), data)))


def test_epochs_count_the_samples_that_prepare_lets_through() -> None:
    """5 of 20 unlabelled samples are drawn, in batches of 4: 2 steps an epoch, not 5."""
    data, _ = client(n=20, labeled=0)

    def five(survey: Survey) -> Prepared:
        return Prepared({}, torch.arange(20) < 5)

    phase = Phase("only", to_class(1), unlabeled=("weak",), prepare=five)
    update = train(Made(made=(phase,)), data, replace(CONFIG, local_steps=None, local_epochs=3))
    assert update.backward == 3 * 2 * 4
