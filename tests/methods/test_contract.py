"""What every entry of METHODS must satisfy; a new method is tested by being listed."""

from __future__ import annotations

import pickle
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from fedlabel.data.augment import AugmentConfig
from fedlabel.data.supervision import supervise
from fedlabel.methods import METHODS, method_class
from fedlabel.methods.base import Batch, Method, Model, Part, Phase
from fedlabel.methods.fedlabel import FedLabel
from fedlabel.training import ClientData, ImageTransform, TrainingConfig, train_client

CLASSES, BATCH = 4, 6
METHOD_NAMES = sorted(METHODS)


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, CLASSES))


def make(name: str) -> Method:
    """The method with defaults, and a threshold low enough that untrained teachers pass it."""
    fields = METHODS[name].__dataclass_fields__
    return METHODS[name](**({"confidence_threshold": 0.0} if "confidence_threshold" in fields else {}))


def make_batch(phase: Phase, seed: int, size: int = BATCH) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def part(names: tuple[str, ...], labeled: bool) -> Part:
        n = size if names else 0
        views = {name: torch.randn(n, 1, 6, 6, generator=generator) for name in names}
        labels = torch.randint(CLASSES, (n,), generator=generator)
        return Part(views, supervise(labels, torch.full((n,), labeled), CLASSES).candidates)

    return Batch(part(phase.labeled, True), part(phase.unlabeled, False))


def phases() -> list[tuple[str, Phase]]:
    return [(name, phase) for name in METHOD_NAMES for phase in make(name).phases(1)]


PHASES = pytest.mark.parametrize(("name", "phase"), phases(), ids=[f"{name}-{phase.name}" for name, phase in phases()])


def teachers_of(phase: Phase) -> dict[str, Model]:
    return {teacher: net(10 + position) for position, teacher in enumerate(phase.teachers)}


@PHASES
def test_loss_is_finite_and_its_gradient_moves_every_parameter(name: str, phase: Phase) -> None:
    student = net()
    step = phase.loss(student, teachers_of(phase), make_batch(phase, 0))
    step.loss.backward()
    assert torch.isfinite(step.loss)
    assert step.examples > 0
    for parameter_name, parameter in student.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


@PHASES
def test_no_gradient_leaks_into_teachers(name: str, phase: Phase) -> None:
    teachers = teachers_of(phase)
    phase.loss(net(), teachers, make_batch(phase, 0)).loss.backward()
    for teacher in teachers.values():
        assert all(parameter.grad is None for parameter in teacher.parameters())  # type: ignore[attr-defined]


@PHASES
def test_empty_batch_gives_exactly_zero(name: str, phase: Phase) -> None:
    step = phase.loss(net(), teachers_of(phase), make_batch(phase, 0, size=0))
    assert step.loss.item() == 0
    assert step.examples == 0
    assert all(torch.isfinite(pair).all() for pair in step.metrics.values())


@PHASES
def test_three_stacked_clients_equal_one_by_one(name: str, phase: Phase) -> None:
    students = [net(seed) for seed in (1, 2, 3)]
    batches = [make_batch(phase, seed) for seed in (4, 5, 6)]
    teacher_names = list(phase.teachers)
    teachers = [[net(seed + 10 * i) for i in range(len(teacher_names))] for seed in (7, 8, 9)]

    skeleton = net()

    def loss(params: Mapping[str, Tensor], teacher_params: list[Mapping[str, Tensor]], batch: Batch) -> Tensor:
        def bind(weights: Mapping[str, Tensor]) -> Model:
            return lambda images: functional_call(skeleton, dict(weights), (images,))

        bound = {key: bind(weights) for key, weights in zip(teacher_names, teacher_params, strict=True)}
        return phase.loss(bind(params), bound, batch).loss

    def stacked(parts: list[Part]) -> Part:
        views = {key: torch.stack([part.views[key] for part in parts]) for key in parts[0].views}
        return Part(views, torch.stack([part.candidates for part in parts]))

    params = stack_module_state(students)[0]
    teacher_params = [stack_module_state([row[i] for row in teachers])[0] for i in range(len(teacher_names))]
    batch = Batch(stacked([b.labeled for b in batches]), stacked([b.unlabeled for b in batches]))
    together = vmap(loss)(params, teacher_params, batch)
    together_grad = vmap(grad(loss))(params, teacher_params, batch)
    for i in range(3):
        own = dict(students[i].named_parameters())
        own_teachers = [dict(model.named_parameters()) for model in teachers[i]]
        torch.testing.assert_close(together[i], loss(own, own_teachers, batches[i]))
        for key, value in grad(loss)(own, own_teachers, batches[i]).items():
            torch.testing.assert_close(together_grad[key][i], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", METHOD_NAMES)
@pytest.mark.parametrize(("n", "labeled"), [(12, 5), (12, 0), (5, 5)], ids=["both", "no labels", "no unlabelled"])
def test_round_is_reproducible_and_survives_empty_parts(name: str, n: int, labeled: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, 1, 6, 6), dtype=torch.uint8, generator=generator)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    data = ClientData(images, supervise(labels, torch.arange(n) < labeled, CLASSES))
    transform = ImageTransform(torch.zeros(1, 1, 1), torch.ones(1, 1, 1), AugmentConfig(crop_padding=1), False)
    state = net().state_dict()
    updates = []
    for _ in range(2):
        torch.rand(1)  # the global generator must not matter
        config = TrainingConfig(local_steps=2, batch_size=4)
        updates.append(train_client(make(name), net(5), net(6), state, data, transform, config, 1, seed=3))
    first, second = updates
    for part, uploaded in first.parts.items():
        assert uploaded.weight >= 0
        for key, value in uploaded.state.items():
            assert torch.isfinite(value).all()
            assert torch.equal(value, second.parts[part].state[key])
    assert first.sums == second.sums


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_method_is_picklable_final_and_described(name: str) -> None:
    method = make(name)
    assert pickle.loads(pickle.dumps(method)) == method
    assert method.name == name
    assert METHODS[name].description
    assert METHODS[name].__base__ is Method


def test_unknown_method_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(ValueError, match=r"`method.name` \(=fedlable\).*Did you mean fedlabel\?"):
        method_class("fedlable")
    with pytest.raises(ValueError, match="cannot be imported"):
        method_class("no_such_module:Method")
    with pytest.raises(ValueError, match="must be a subclass"):
        method_class("collections:OrderedDict")
    assert method_class("fedlabel.methods.fedlabel:FedLabel") is FedLabel
