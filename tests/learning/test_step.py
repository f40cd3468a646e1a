"""One optimiser step: against torch's own, and what must not move."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fedlabel.data.labels.supervision import reveal_labels
from fedlabel.learning.client import ClientData, Trainer, train_client
from fedlabel.learning.meter import Meter, Passes
from fedlabel.learning.plan import draw_batches
from fedlabel.learning.step import Fused, Sgd, Stepper, counted, frozen_model
from fedlabel.learning.training_config import TrainingConfig
from fedlabel.methods import METHODS
from fedlabel.methods.batch import Batch, Model, Step
from fedlabel.methods.fedlabel import FedLabel
from fedlabel.methods.losses import labels_loss
from fedlabel.methods.recipe import Phase, Update
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
    distance,
    to_class,
    train,
)
from tests.methods.recipes import LATE, classes_of, make_student, recipe_of
from tests.methods.tables import CLASSES, model, net, same

NO_BATCH = SimpleNamespace(log_prior=torch.zeros(0))
"""For losses that look at no sample."""


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
    assert not same(model(update), model(train(Supervised(), data, config)))


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize(("clip", "prox"), [(None, 0.0), (0.5, 0.0), (None, 0.3), (0.5, 0.3)])
@pytest.mark.parametrize("masked", [False, True])
def test_sgd_is_torchs_to_the_bit(
    momentum: float, nesterov: bool, weight_decay: float, clip: float | None, prox: float, masked: bool
) -> None:
    """Seven steps, beside torch.optim.SGD on the same gradients. The third uses no sample; one layer has no gradient in
    the first two, so that its momentum starts later.
    """
    config = TrainingConfig(
        lr=0.07,
        local_steps=7,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        max_grad_norm=clip,
        prox_mu=prox,
    )
    own, reference = (nn.Sequential(nn.Linear(5, 70), nn.Linear(70, 3)) for _ in range(2))
    reference.load_state_dict(own.state_dict())
    received = {name: value.clone() for name, value in own.state_dict().items()}
    optimizer = torch.optim.SGD(reference.parameters(), 0.07, momentum, 0.0, weight_decay, nesterov)
    generator = torch.Generator().manual_seed(0)

    def value(layers: Model, inputs: Tensor, number: int) -> Tensor:
        return layers(inputs[:, :70] if number < 2 else inputs[:, :5]).tanh().sum()

    for number in range(7):
        inputs = torch.randn(4, 70, generator=generator)

        def loss(
            student: Model, teachers: Mapping[str, Model], batch: Batch, x: Tensor = inputs, n: int = number
        ) -> Step:
            found = value(own[1] if n < 2 else own, x, n)
            return Step(found, {}, torch.tensor(0.0 if n == 2 else 4.0))

        if number == 0:
            update = Update(loss)
            stepper = Stepper.of(own, update, None, received, config, Passes(), masked)
            stepper.begin()
        stepper = replace(stepper, update=Update(loss))
        stepper.step({}, NO_BATCH)  # type: ignore[arg-type]
        if number != 2:
            optimizer.zero_grad()
            value(reference[1] if number < 2 else reference, inputs, number).backward()
            for name, parameter in reference.named_parameters():
                if parameter.grad is not None and prox:
                    parameter.grad.add_(parameter.detach() - received[name], alpha=prox)
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(reference.parameters(), clip)
            optimizer.step()
        assert same(own.state_dict(), reference.state_dict()), number


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
    assert same(loose, free)


def test_gradient_norm_is_cut_with_the_proximal_pull_in_it_in_every_step() -> None:
    """After k steps nothing can be further away than k * lr * max_grad_norm, however strong the pull."""
    data, _ = client()
    update = train(Supervised(), data, replace(CONFIG, max_grad_norm=0.01, prox_mu=1e4))
    assert 0 < distance(model(update), net().state_dict()) <= 5 * 0.2 * 0.01 * (1 + 1e-4)


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
    assert not same(plain, proximal)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_prox_mu_holds_every_method_near_the_global_weights(name: str) -> None:
    """The same round with and without the term; lr * mu = .4 a step is far from overshooting."""
    classes = classes_of(name)
    labels = torch.arange(16) % classes
    images = torch.randint(256, (16, 1, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = ClientData(images, reveal_labels(labels, torch.arange(16) < 8, classes))
    recipe, start = recipe_of(name), make_student(name).state_dict()
    far, near = (
        train_client(
            recipe,
            Trainer(make_student(name, 5), make_student(name, 6), TRANSFORM, TrainingConfig(lr=0.05, prox_mu=mu)),
            start,
            data,
            LATE,
            3,
            recipe.shared.broadcast(recipe.shared.start()),
            {"previous": start},
        )
        for mu in (0.0, 8.0)
    )
    for part, uploaded in far.parts.items():
        assert 0 < distance(near.parts[part].state, start) < 0.8 * distance(uploaded.state, start)


def test_steps_without_kept_samples_move_nothing_even_with_momentum_and_decay() -> None:
    data, _ = client(labeled=0)
    method = FedLabel(confidence_threshold=1.0, prox_mu=1.0)
    update = train(method, data, replace(CONFIG, momentum=0.9, weight_decay=0.1))
    assert same(model(update), net().state_dict())


def test_steps_without_kept_samples_leave_batch_norm_alone() -> None:
    data, _ = client(labeled=0)
    normed = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))
    start = {name: value.clone() for name, value in normed.state_dict().items()}
    recipe = FedLabel(confidence_threshold=1.0).recipe(TASK)
    update = train_client(recipe, Trainer(normed, copy.deepcopy(normed), TRANSFORM, CONFIG), start, data, 1, 7)
    assert same(model(update), start)


def test_only_the_parameters_of_an_update_move() -> None:
    """Momentum, decay and the proximal pull spare the others, too; afterwards all can be trained again."""
    data, _ = client()
    config = replace(CONFIG, momentum=0.9, weight_decay=0.1, prox_mu=0.1)

    def last(names: Sequence[str]) -> list[str]:
        assert list(names) == ["1.weight", "1.bias", "3.weight", "3.bias"]
        return [name for name in names if name.startswith("3.")]

    start = net().state_dict()
    update = model(train(Made(made=(Phase("train", labels_loss, trains=last),)), data, config))
    for name, value in start.items():
        assert torch.equal(update[name], value) == (not name.startswith("3.")), name
    phases = (
        Phase("head", labels_loss, trains=last),
        Phase("all", labels_loss, start="head"),
    )
    update = model(train(Made(made=phases), data, config))
    assert not any(torch.equal(update[name], value) for name, value in start.items())
    student = net()
    train_client(Made(made=phases[:1]).recipe(TASK), Trainer(student, net(), TRANSFORM, config), start, data, 1, 7)
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_a_second_optimiser_step_sees_what_the_first_did() -> None:
    """One batch, step A on the last layer, then step B on the first: written out with two torch optimisers."""
    data, _ = client()
    images = data.images.float() / 255
    phase = Phase(
        "train",
        to_class(0),
        draw=UNLABELED,
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

    phase = Phase("train", to_class(0), draw=UNLABELED, then=(Update(flat, penalty=penalty),))
    one = replace(CONFIG, local_steps=1)
    with_penalty, without = (model(train(Made(made=(p,)), data, one)) for p in (phase, replace(phase, then=())))
    torch.testing.assert_close(with_penalty["3.bias"], 0.8 * without["3.bias"])
    assert all(torch.equal(with_penalty[name], without[name]) for name in without if name != "3.bias")


# Models as losses see them.


def test_a_frozen_model_has_its_own_weights_and_no_gradient() -> None:
    module, images = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.9)), torch.randn(4, 2)
    state = {name: value + 1 for name, value in module.state_dict().items()}
    before = {name: value.clone() for name, value in module.state_dict().items()}
    outputs = frozen_model(module, state)(images)
    torch.testing.assert_close(outputs, images @ state["0.weight"].T + state["0.bias"])  # and nothing dropped
    assert not outputs.requires_grad
    assert same(module.state_dict(), before)


def test_weights_that_a_state_lacks_are_borrowed_as_they_are_at_each_call() -> None:
    module, lender, images = nn.Linear(2, 3), nn.Linear(2, 3), torch.randn(4, 2)
    model = frozen_model(module, {"bias": torch.ones(3)}, lender)
    torch.testing.assert_close(model(images), images @ lender.weight.T + 1)
    with torch.no_grad():
        lender.weight.mul_(2)
    torch.testing.assert_close(model(images), images @ lender.weight.T + 1)


def test_passes_are_counted_once_from_the_inputs() -> None:
    """Heads on embeddings go on from where a pass through the trunk ended."""
    meter = Meter({})
    model = counted(lambda inputs, *part: inputs, meter)
    for part in ((), ("all",), ("embed",), ("heads",), ("bags",), ("classify",)):
        assert torch.equal(model(torch.ones(3, 1), *part), torch.ones(3, 1))
    assert meter.forward == 4 * 3
    assert meter.backward == 0


def test_a_students_pass_without_gradient_is_only_forth() -> None:
    """Four labelled samples with and four without: eight forth, four back, in each of five steps."""
    data, _ = client()

    def twice(student: Model, teachers: Mapping[str, Model], batch: Batch) -> Step:
        with torch.no_grad():
            student(batch.unlabeled.views["weak"])
        return labels_loss(student, teachers, batch)

    update = train(Made(made=(Phase("train", twice, draw=BOTH),)), data)
    assert (update.forward, update.backward) == (5 * 8, 5 * 4)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 0.0), (0.9, 0.1)])
@pytest.mark.parametrize("kind", [Sgd, Fused])
def test_a_masked_step_that_is_not_active_changes_nothing(
    kind: type[Sgd] | type[Fused], momentum: float, decay: float, nesterov: bool
) -> None:
    """Steps 1 and 3 are masked out, with gradients that are no numbers: what is left is steps 2 and 4."""
    if nesterov and not momentum:
        return
    config = replace(TrainingConfig(), lr=0.1, momentum=momentum, weight_decay=decay, nesterov=nesterov)
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in [(3,), (2, 4), ()]]
    gradients = [[torch.randn(value.shape, generator=generator) for value in start] for _ in range(2)]
    masked, plain = ([nn.Parameter(value.clone()) for value in start] for _ in range(2))
    stepped, reference = kind(masked, config), kind(plain, config)
    for gradient in gradients:
        for one, other, value in zip(masked, plain, gradient, strict=True):
            one.grad, other.grad = torch.full_like(value, torch.nan), value.clone()
        stepped.step(torch.tensor(False))
        for one, value in zip(masked, gradient, strict=True):
            one.grad = value.clone()
        stepped.step(torch.tensor(True))
        reference.step()
    for one, other, value in zip(masked, plain, start, strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, value)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_fused_is_as_torchs_own(kind: str) -> None:
    of_sgd = {"momentum": 0.9, "nesterov": True} if kind == "sgd" else {}
    config = replace(TrainingConfig(), lr=0.1, weight_decay=0.1, optimizer=kind, **of_sgd)
    one, other = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    reference: torch.optim.Optimizer = torch.optim.SGD([other], 0.1, 0.9, weight_decay=0.1, nesterov=True)
    if kind == "adamw":
        reference = torch.optim.AdamW([other], 0.1, weight_decay=0.1)
    fused = Fused([one], config)
    for step in range(3):
        one.grad, other.grad = (torch.arange(5.0) - step for _ in range(2))
        fused.step(torch.tensor(True))
        reference.step()
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
