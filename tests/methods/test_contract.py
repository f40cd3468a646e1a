"""What every entry of METHODS must satisfy; a new method is tested by being listed."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils._pytree import tree_map

from fedlabel.data.augment import AugmentConfig
from fedlabel.data.labels.label_card import label_card
from fedlabel.data.labels.supervision import Supervision, reveal_labels
from fedlabel.learning.client import ClientData, Trainer, train_client
from fedlabel.learning.task import check_labels
from fedlabel.learning.training_config import TrainingConfig
from fedlabel.learning.views import ImageTransform
from fedlabel.methods import METHODS, method_class
from fedlabel.methods.batch import Batch, Model, Part, Prepared, State, Step, Survey
from fedlabel.methods.fedlabel import FedLabel
from fedlabel.methods.recipe import ByBag, BySample, LabelKinds, Method, Phase, Recipe, Update
from fedlabel.metric_tags import client_tags
from tests.methods.batches import certain_part
from tests.methods.recipes import LATE, classes_of, make, make_student, recipe_of

BATCH = 6
AT_SERVER = -1
"""In place of a stage's number: what the server trains on its labels."""
HEADS = ("bag_hidden.", "bag_output.", "heads.")
"""Parameters that see no label of a sample."""
METHOD_NAMES = sorted(METHODS)
OLD_HOOKS = """
additive networks bag_head labeling_heads functions_vote reads_annotations reads_sets_of_bags needs_embeddings
input_gradients server_labels starts_stage begin_stage stage_name averaging interim judged helpers upload
claimed_bytes initial_memory states kept_like statistics check_statistics check_shared initial_shared
server_step told noise_matrix function_accuracy server_phases check doubts
"""
"""What a method defined before it gave a recipe: nothing calls these any more. (Not `loss`, `phases` and `keep`: some
methods name so what they put into their recipe.)"""


class Case(NamedTuple):
    """One optimiser step of a phase of a stage of a method; or the phase's E step alone, where it takes no step."""

    name: str
    stage: int
    phase: Phase
    update: Update

    @property
    def recipe(self) -> Recipe:
        return recipe_of(self.name)

    def make_batch(self, seed: int, size: int = BATCH) -> Batch:
        """Random images; the targets and the memory are what the phase's E step makes of them."""
        generator, classes, draw = torch.Generator().manual_seed(seed), classes_of(self.name), self.phase.draw

        def part(names: tuple[str, ...], labeled: bool) -> Part:
            n = size if names else 0
            views = {name: torch.randn(n, 1, 6, 6, generator=generator) for name in names}
            labels = torch.randint(classes, (n,), generator=generator)
            if isinstance(draw, ByBag):
                return self.bags(views, labels, generator)
            supervision = reveal_labels(labels, torch.full((n,), labeled), classes)
            return certain_part(views, supervision.candidates, self.targets(supervision, generator))

        unlabeled = () if isinstance(draw, ByBag) else draw.unlabeled
        mix = draw.mix if isinstance(draw, BySample) else ()
        parts = [part(draw.labeled, True), part(unlabeled, False), part(mix, False)]
        return Batch(*parts, torch.rand((), generator=generator), self.memory(generator))

    def bags(self, views: dict[str, Tensor], labels: Tensor, generator: torch.Generator) -> Part:
        """A bag of three, one of two and a sample of which nothing is known; or none of them."""
        n, classes = len(labels), classes_of(self.name)
        none = torch.ones(n, classes, dtype=torch.bool)
        members, bag = torch.tensor([[0, 1, 2], [3, 4, -1], [5, -1, -1]]), torch.tensor([0, 0, 0, 1, 1, -1])
        counts = torch.stack([torch.bincount(labels[bag[:n] == b], minlength=classes) for b in (0, 1)])
        supervision = Supervision.certain(none)
        if n:
            supervision = replace(supervision, bag=bag, bag_counts=counts)
        part = certain_part(views, none, self.targets(supervision, generator))
        counts = torch.cat([counts, torch.zeros(1, classes, dtype=torch.int64)])
        return part._replace(members=members[: n // 2], bag_counts=counts[: n // 2])

    def memory(self, generator: torch.Generator) -> State:
        nothing = torch.ones(BATCH, classes_of(self.name), dtype=torch.bool)
        start = self.start(nothing)
        return self.prepare(Supervision.certain(nothing), generator, start).memory or start

    def targets(self, supervision: Supervision, generator: torch.Generator) -> dict[str, Tensor]:
        return self.prepare(supervision, generator, self.start(supervision.candidates)).targets

    def start(self, candidates: Tensor) -> State:
        """The memory of a client that never trained."""
        recipe = self.recipe
        return {**recipe.memory.start(candidates), **recipe.shared.broadcast(recipe.shared.start())}

    def prepare(self, supervision: Supervision, generator: torch.Generator, memory: State) -> Prepared:
        if self.phase.prepare is None:
            return Prepared({})
        n, classes = len(supervision.candidates), classes_of(self.name)

        def predict(teacher: str, view: str, part: str = "all") -> Tensor:
            assert teacher in self.phase.teachers
            shapes = {"all": (classes,), "embed": (8,), "heads": (self.recipe.num_functions, classes + 1)}
            return torch.randn(n, *shapes[part], generator=generator)

        def inputs() -> Tensor:
            return torch.randn(n, 1, 6, 6, generator=generator)

        return self.phase.prepare(Survey(predict, supervision, memory, inputs))

    def step(self, batch: Batch) -> Step:
        return self.update.loss(make_student(self.name), teachers_of(self), batch)


def cases() -> list[Case]:
    """Those of the first, the second and the last round of every stage, and of what the server trains where it can."""
    found: dict[tuple[object, ...], Case] = {}
    for name in METHOD_NAMES:
        recipe = recipe_of(name)
        for number, stage in enumerate(recipe.stages):
            for round_in_stage in (1, 2, stage.rounds or LATE):
                phases = stage.phases(round_in_stage) if callable(stage.phases) else stage.phases
                for phase in phases:
                    for position, update in enumerate(phase.updates):
                        key = (name, number, phase.name, phase.steps == 0, position)
                        found.setdefault(key, Case(name, number, phase, update))
        for phase in recipe.server_phases if LabelKinds.AT_SERVER in recipe.uses else ():
            for update in phase.updates:
                found[(name, AT_SERVER, phase.name)] = Case(name, AT_SERVER, phase, update)
    return list(found.values())


def case_id(case: Case) -> str:
    return f"{case.name}-{case.stage}-{case.phase.name}-{case.phase.updates.index(case.update)}"


ALL_CASES = cases()
STEPS = pytest.mark.parametrize("case", [case for case in ALL_CASES if case.phase.steps != 0], ids=case_id)


def teachers_of(case: Case) -> dict[str, Model]:
    return {name: make_student(case.name, 10 + position) for position, name in enumerate(case.phase.teachers)}


def trained(case: Case, student: nn.Module) -> set[str]:
    names = [name for name, _ in student.named_parameters()]
    moved = set(names if case.update.trains is None else case.update.trains(names))
    return {name for name in moved if not (case.stage == AT_SERVER and name.startswith(HEADS))}


@STEPS
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


@STEPS
def test_no_gradient_leaks_into_teachers(case: Case) -> None:
    teachers = teachers_of(case)
    case.update.loss(make_student(case.name), teachers, case.make_batch(0)).loss.backward()
    for teacher in teachers.values():
        assert all(parameter.grad is None for parameter in teacher.parameters())  # type: ignore[attr-defined]


@STEPS
def test_targets_metrics_and_memory_are_detached(case: Case) -> None:
    step = case.step(case.make_batch(0))
    assert not any(pair.requires_grad for pair in step.metrics.values())
    assert step.pseudo is None or not any(values.requires_grad for values in step.pseudo)
    assert not any(value.requires_grad for value in (step.memory or {}).values())


@STEPS
def test_empty_batch_gives_exactly_zero(case: Case) -> None:
    step = case.step(case.make_batch(0, size=0))
    assert all(torch.isfinite(value).all() for value in (step.memory or {}).values())
    assert step.loss.item() == 0
    assert step.examples == 0
    assert all(torch.isfinite(pair).all() for pair in step.metrics.values())


@STEPS
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


@pytest.mark.parametrize("case", ALL_CASES, ids=case_id)
def test_metrics_are_declared(case: Case) -> None:
    """The server refuses others."""
    declared = client_tags(METHODS[case.name].metrics)
    generator, nothing = torch.Generator().manual_seed(0), torch.ones(BATCH, classes_of(case.name), dtype=torch.bool)
    made = {*case.prepare(Supervision.certain(nothing), generator, case.start(nothing)).metrics}
    if case.phase.steps != 0:
        metrics = case.step(case.make_batch(0)).metrics
        assert metrics
        made |= metrics.keys()
    assert made <= declared.keys()


def rounds() -> list[tuple[str, int]]:
    """The first and the last round of every stage of every method."""
    found = []
    for name in METHOD_NAMES:
        before = 0
        for stage in recipe_of(name).stages:
            last = LATE if stage.rounds is None else before + stage.rounds
            found += [(name, number) for number in dict.fromkeys((before + 1, last)) if last > before]
            before = last
    return found


@pytest.mark.parametrize(("name", "round_number"), rounds())
@pytest.mark.parametrize(("n", "labeled"), [(12, 5), (12, 0), (5, 5)], ids=["both", "no labels", "no unlabelled"])
def test_round_is_reproducible_and_survives_empty_parts(name: str, n: int, labeled: int, round_number: int) -> None:
    generator, classes, recipe = torch.Generator().manual_seed(0), classes_of(name), recipe_of(name)
    images = torch.randint(256, (n, 1, 6, 6), dtype=torch.uint8, generator=generator)
    labels = torch.randint(classes, (n,), generator=generator)
    data = ClientData(images, reveal_labels(labels, torch.arange(n) < labeled, classes))
    transform = ImageTransform(torch.zeros(1, 1, 1), torch.ones(1, 1, 1), AugmentConfig(crop_padding=1), False)
    state = make_student(name).state_dict()
    updates = []
    for _ in range(2):
        torch.rand(1)  # the global generator must not matter
        config = TrainingConfig(local_steps=2, batch_size=4)
        trainer = Trainer(make_student(name, 5), make_student(name, 6), transform, config, METHODS[name].metrics)
        shared = recipe.shared.broadcast(recipe.shared.start())
        before = {"previous": state}
        updates.append(train_client(recipe, trainer, state, data, round_number, 3, shared, before))
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
    assert METHODS[name].__bases__ == (Method,)


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_recipe_is_picklable_and_its_stages_fill_the_run(name: str) -> None:
    recipe = recipe_of(name)
    again = pickle.loads(pickle.dumps(recipe))
    for round_number in (1, LATE):
        assert [phase.name for phase in again.phases(round_number)] == [p.name for p in recipe.phases(round_number)]
    assert recipe.uses
    assert all(stage.rounds is not None for stage in recipe.stages[:-1])
    assert recipe.stages[-1].rounds is None


def test_no_method_is_the_base_of_another() -> None:
    """Families are functions that return recipes."""
    listed = set(METHODS.values())
    assert listed <= set(Method.__subclasses__())
    assert not [method.__name__ for method in listed if listed & set(method.__subclasses__())]


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_a_method_defines_no_hook_that_nothing_calls(name: str) -> None:
    assert not set(OLD_HOOKS.split()) & (vars(METHODS[name]).keys() | vars(Method).keys())


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
    """Annotators' labels alone are something for ILL only, bags for those that draw them; labels for all."""
    recipe, classes = recipe_of(name), classes_of(name)
    nothing = torch.ones(5, classes, dtype=torch.bool)
    crowd = Supervision.without_bags(nothing, torch.zeros(5, dtype=torch.bool), torch.zeros(5, 2, dtype=torch.int64))
    if name == "ill":
        check_labels(name, recipe, label_card(crowd))
    else:
        with pytest.raises(ValueError, match=rf"`method.name` \(={name}\) learns from .*(method.name=ill|kind=bags)"):
            check_labels(name, recipe, label_card(crowd))
    labels = reveal_labels(torch.zeros(5, dtype=torch.int64), torch.arange(5) < 1, classes)
    check_labels(name, recipe, label_card(labels))
    counts = torch.eye(classes, dtype=torch.int64)[:1] * 5
    bags = replace(Supervision.certain(nothing), bag=torch.zeros(5, dtype=torch.int64), bag_counts=counts)
    draws_bags = any(isinstance(phase.draw, ByBag) for phase in recipe.phases(1))
    assert draws_bags == (LabelKinds.BAGS in recipe.uses)
    if draws_bags:
        check_labels(name, recipe, label_card(bags))
    else:
        with pytest.raises(ValueError, match=rf"`method.name` \(={name}\) learns from .*method.name="):
            check_labels(name, recipe, label_card(bags))
