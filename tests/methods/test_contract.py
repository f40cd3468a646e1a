"""What every entry of METHODS must satisfy; a new method is tested by being listed."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from fedlabel.methods.base import Method, Phase, Prepared, Survey, Update
from fedlabel.methods.steps import Batch, Model, Part, State
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils._pytree import tree_map

from fedlabel.data.augment import AugmentConfig
from fedlabel.data.labels.supervision import Supervision, supervise
from fedlabel.learning.client import ClientData, ImageTransform, Trainer, train_client
from fedlabel.learning.training_config import TrainingConfig
from fedlabel.methods import METHODS, method_class
from fedlabel.methods.bags import BagMethod
from fedlabel.methods.fedlabel import FedLabel
from fedlabel.methods.masks import MaskedMethod
from fedlabel.models.additive import Additive
from fedlabel.models.bag_head import BagHead
from fedlabel.models.labeling_heads import LabelingHeads
from fedlabel.models.nets import Mlp
from fedlabel.models.twins import Twins
from tests.methods.batches import certain_part

CLASSES, BATCH = 4, 6
LATE = 1000
"""A round after all warm-ups."""
METHOD_NAMES = sorted(METHODS)


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, CLASSES))


def make(name: str) -> Method:
    """The method with defaults, and a threshold low enough that untrained teachers pass it."""
    fields = METHODS[name].__dataclass_fields__
    return METHODS[name](**({"confidence_threshold": 0.0} if "confidence_threshold" in fields else {}))


def make_student(name: str, seed: int = 0) -> nn.Module:
    method = make(name)
    if method.bag_head:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return BagHead(Mlp((1, 6, 6), CLASSES, (8,)), method.bag_head)
    if method.labeling_heads:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LabelingHeads(Mlp((1, 6, 6), CLASSES, (8,)), method.labeling_heads)
    if method.networks > 1:
        return Twins([net(100 * place + seed) for place in range(method.networks)])
    return Additive(net(seed), method.additive) if method.additive else net(seed)


class Case(NamedTuple):
    """One optimiser step of a phase of a method."""

    name: str
    phase: Phase
    update: Update

    def make_batch(self, seed: int, size: int = BATCH) -> Batch:
        """Random images; the targets and the memory are what the phase's E step makes of them."""
        generator = torch.Generator().manual_seed(seed)

        def part(names: tuple[str, ...], labeled: bool) -> Part:
            n = size if names else 0
            views = {name: torch.randn(n, 1, 6, 6, generator=generator) for name in names}
            labels = torch.randint(CLASSES, (n,), generator=generator)
            if self.phase.bags:
                return self.bags(views, labels, generator)
            known = supervise(labels, torch.full((n,), labeled), CLASSES)
            return certain_part(views, known.candidates, self.targets(known, generator))

        parts = [part(self.phase.labeled, True), part(self.phase.unlabeled, False), part(self.phase.mix, False)]
        return Batch(*parts, torch.rand((), generator=generator), self.memory(generator))

    def bags(self, views: dict[str, Tensor], labels: Tensor, generator: torch.Generator) -> Part:
        """A bag of three, one of two and a sample of which nothing is known; or none of them."""
        n = len(labels)
        none = torch.ones(n, CLASSES, dtype=torch.bool)
        members, bag = torch.tensor([[0, 1, 2], [3, 4, -1], [5, -1, -1]]), torch.tensor([0, 0, 0, 1, 1, -1])
        counts = torch.stack([torch.bincount(labels[bag[:n] == b], minlength=CLASSES) for b in (0, 1)])
        known = Supervision.certain(none)
        if n:
            known = replace(known, bag=bag, bag_counts=counts)
        part = certain_part(views, none, self.targets(known, generator))
        counts = torch.cat([counts, torch.zeros(1, CLASSES, dtype=torch.int64)])
        return part._replace(members=members[: n // 2], bag_counts=counts[: n // 2])

    def memory(self, generator: torch.Generator) -> State:
        nothing = torch.ones(BATCH, CLASSES, dtype=torch.bool)
        method = make(self.name)
        start = {**method.initial_memory(nothing), **method.initial_shared(CLASSES)}
        return self.prepare(Supervision.certain(nothing), generator, start).memory or start

    def targets(self, known: Supervision, generator: torch.Generator) -> dict[str, Tensor]:
        method = make(self.name)
        memory = {**method.initial_memory(known.candidates), **method.initial_shared(CLASSES)}
        return self.prepare(known, generator, memory).targets

    def prepare(self, known: Supervision, generator: torch.Generator, memory: State) -> Prepared:
        if self.phase.prepare is None:
            return Prepared({})
        n = len(known.candidates)

        def predict(teacher: str, view: str, part: str = "all") -> Tensor:
            assert teacher in self.phase.teachers
            shapes = {"all": (CLASSES,), "embed": (8,), "heads": (make(self.name).labeling_heads, CLASSES + 1)}
            return torch.randn(n, *shapes[part], generator=generator)

        def inputs() -> Tensor:
            return torch.randn(n, 1, 6, 6, generator=generator)

        return self.phase.prepare(Survey(predict, known, memory, inputs))


def cases() -> list[Case]:
    """All of them, of an early and of a late round."""
    found = {}
    for name in METHOD_NAMES:
        for round_number in (1, LATE):
            for phase in make(name).phases(round_number):
                for position, update in enumerate(phase.updates):
                    found.setdefault((name, phase.name, position), Case(name, phase, update))
    return list(found.values())


def case_id(case: Case) -> str:
    return f"{case.name}-{case.phase.name}-{case.phase.updates.index(case.update)}"


CASES = pytest.mark.parametrize("case", cases(), ids=case_id)


def teachers_of(case: Case) -> dict[str, Model]:
    return {name: make_student(case.name, 10 + position) for position, name in enumerate(case.phase.teachers)}


def trained(case: Case, student: nn.Module) -> set[str]:
    names = [name for name, _ in student.named_parameters()]
    return set(names if case.update.trains is None else case.update.trains(names))


@CASES
def test_loss_is_finite_and_its_gradient_moves_every_trained_parameter(case: Case) -> None:
    student = make_student(case.name)
    moved = trained(case, student)
    assert moved
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in moved)
    step = case.update.loss(student, teachers_of(case), case.make_batch(0))
    step.loss.backward()
    assert torch.isfinite(step.loss)
    assert step.examples > 0
    for name, parameter in student.named_parameters():
        if name in moved:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


@CASES
def test_no_gradient_leaks_into_teachers(case: Case) -> None:
    teachers = teachers_of(case)
    case.update.loss(make_student(case.name), teachers, case.make_batch(0)).loss.backward()
    for teacher in teachers.values():
        assert all(parameter.grad is None for parameter in teacher.parameters())  # type: ignore[attr-defined]


@CASES
def test_targets_metrics_and_memory_are_detached(case: Case) -> None:
    step = case.update.loss(make_student(case.name), teachers_of(case), case.make_batch(0))
    assert not any(pair.requires_grad for pair in step.metrics.values())
    assert step.pseudo is None or not any(values.requires_grad for values in step.pseudo)
    assert not any(value.requires_grad for value in (step.memory or {}).values())


@CASES
def test_empty_batch_gives_exactly_zero(case: Case) -> None:
    step = case.update.loss(make_student(case.name), teachers_of(case), case.make_batch(0, size=0))
    assert all(torch.isfinite(value).all() for value in (step.memory or {}).values())
    assert step.loss.item() == 0
    assert step.examples == 0
    assert all(torch.isfinite(pair).all() for pair in step.metrics.values())


@CASES
def test_three_stacked_clients_equal_one_by_one(case: Case) -> None:
    students = [make_student(case.name, seed) for seed in (1, 2, 3)]
    batches = [case.make_batch(seed) for seed in (4, 5, 6)]
    names = list(case.phase.teachers)
    teachers = [[make_student(case.name, seed + 10 * i) for i in range(len(names))] for seed in (7, 8, 9)]
    skeleton = make_student(case.name)

    def loss(params: Mapping[str, Tensor], teacher_params: list[Mapping[str, Tensor]], batch: Batch) -> Tensor:
        def bind(weights: Mapping[str, Tensor]) -> Model:
            return lambda *inputs: functional_call(skeleton, dict(weights), inputs)

        bound = {key: bind(weights) for key, weights in zip(names, teacher_params, strict=True)}
        return case.update.loss(bind(params), bound, batch).loss

    params = stack_module_state(students)[0]
    teacher_params = [stack_module_state([row[i] for row in teachers])[0] for i in range(len(names))]
    batch = tree_map(lambda *tensors: torch.stack(tensors), *batches)
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
@pytest.mark.parametrize("round_number", [1, LATE])
def test_round_is_reproducible_and_survives_empty_parts(name: str, n: int, labeled: int, round_number: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, 1, 6, 6), dtype=torch.uint8, generator=generator)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    data = ClientData(images, supervise(labels, torch.arange(n) < labeled, CLASSES))
    transform = ImageTransform(torch.zeros(1, 1, 1), torch.ones(1, 1, 1), AugmentConfig(crop_padding=1), False)
    state = make_student(name).state_dict()
    updates = []
    for _ in range(2):
        torch.rand(1)  # the global generator must not matter
        config = TrainingConfig(local_steps=2, batch_size=4)
        trainer = Trainer(make_student(name, 5), make_student(name, 6), transform, config)
        shared = make(name).initial_shared(CLASSES)
        before = {"previous": state}
        updates.append(train_client(make(name), trainer, state, data, round_number, 3, shared, before))
    first, second = updates
    for part, uploaded in first.parts.items():
        assert uploaded.weight >= 0
        for key, value in uploaded.state.items():
            assert torch.isfinite(value).all()
            assert torch.equal(value, second.parts[part].state[key])
    assert first.sums == second.sums
    for kept, again in ((first.kept, second.kept), (first.statistics, second.statistics)):
        assert kept.keys() == again.keys()
        assert all(torch.equal(kept[key], again[key]) and torch.isfinite(kept[key]).all() for key in kept)


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_method_is_picklable_final_and_described(name: str) -> None:
    method = make(name)
    assert pickle.loads(pickle.dumps(method)) == method
    assert method.name == name
    assert METHODS[name].description
    assert METHODS[name].__base__ in (Method, MaskedMethod, BagMethod)


def test_unknown_method_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(ValueError, match=r"`method.name` \(=fedlable\).*Did you mean fedlabel\?"):
        method_class("fedlable")
    with pytest.raises(ValueError, match="cannot be imported"):
        method_class("no_such_module:Method")
    with pytest.raises(ValueError, match="must be a subclass"):
        method_class("collections:OrderedDict")
    assert method_class("fedlabel.methods.fedlabel:FedLabel") is FedLabel


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_a_method_that_could_learn_nothing_is_refused(name: str) -> None:
    """Annotators' labels alone are something for ILL only, bags for those that learn from them; labels for all."""
    nothing = torch.ones(5, CLASSES, dtype=torch.bool)
    crowd = Supervision.without_bags(nothing, torch.zeros(5, dtype=torch.bool), torch.zeros(5, 2, dtype=torch.int64))
    if name == "ill":
        make(name).check(crowd)
    else:
        with pytest.raises(ValueError, match=rf"`method.name` \(={name}\) learns from .*(method.name=ill|kind=bags)"):
            make(name).check(crowd)
    classes = 2 if name == "top_count" else CLASSES
    make(name).check(supervise(torch.zeros(5, dtype=torch.int64), torch.arange(5) < 1, classes))
    bags = Supervision.certain(torch.ones(5, classes, dtype=torch.bool))
    bags = replace(
        bags, bag=torch.zeros(5, dtype=torch.int64), bag_counts=torch.eye(classes, dtype=torch.int64)[:1] * 5
    )
    if any(phase.bags for phase in make(name).phases(1)):
        make(name).check(bags)
    else:
        with pytest.raises(ValueError, match=rf"`method.name` \(={name}\) learns from .*method.name="):
            make(name).check(bags)
