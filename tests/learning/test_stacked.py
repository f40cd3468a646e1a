"""Clients in a stack, or in a captured graph, compute what they compute alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedlabel.learning.client as client_module
from fedlabel.data.augment import AugmentConfig
from fedlabel.data.labels.supervision import Supervision, reveal_labels
from fedlabel.learning.client import ClientData, ClientUpdate, LocalRound, Trainer, train_clients
from fedlabel.learning.graphs import Graphs
from fedlabel.learning.prior import PriorConfig
from fedlabel.learning.stacked import IN_CACHE, Stack, automatic_size, why_not
from fedlabel.learning.training_config import TrainingConfig
from fedlabel.learning.views import ImageTransform
from fedlabel.methods import METHODS
from fedlabel.methods.batch import Batch, Model, StateDict, Step
from fedlabel.methods.recipe import ByBag, LabelKinds, Phase, Recipe, Stage, Update
from tests.learning.clients import BOTH, CONFIG, TRANSFORM, client
from tests.methods.recipes import classes_of, make_student, recipe_of
from tests.methods.tables import CLASSES, net
from tests.methods.test_contract import rounds

STRONG = ImageTransform(torch.zeros(1, 1, 1), torch.ones(1, 1, 1), AugmentConfig(crop_padding=1, cutout=0.3), True)
CLIENTS, SAMPLES, LABELED = 3, 12, 5


def clients_of(name: str, recipe: Recipe, state: StateDict, round_number: int) -> list[LocalRound]:
    """Three clients of a method; in bags of 4 if a phase draws these."""
    classes, generator = classes_of(name), torch.Generator().manual_seed(0)
    shared, found = recipe.shared.broadcast(recipe.shared.start()), []
    for seed in range(CLIENTS):
        images = torch.randint(256, (SAMPLES, 1, 6, 6), dtype=torch.uint8, generator=generator)
        labels = torch.randint(classes, (SAMPLES,), generator=generator)
        supervision = reveal_labels(labels, torch.arange(SAMPLES) < LABELED, classes)
        if any(isinstance(phase.draw, ByBag) for phase in recipe.phases(round_number)):
            bag = torch.arange(SAMPLES) // 4
            counts = torch.stack([torch.bincount(labels[bag == b], minlength=classes) for b in range(3)])
            none = torch.zeros(SAMPLES, 0, dtype=torch.int64)
            everything = torch.ones(SAMPLES, classes, dtype=torch.bool)
            supervision = Supervision(everything, torch.zeros(SAMPLES, dtype=torch.bool), none, bag, counts, none)
        found.append(LocalRound(ClientData(images, supervision), seed, shared, {"previous": state}))
    return found


def assert_close(found: ClientUpdate, expected: ClientUpdate) -> None:
    assert found.parts.keys() == expected.parts.keys()
    for part, uploaded in found.parts.items():
        assert uploaded.weight == pytest.approx(expected.parts[part].weight)
        torch.testing.assert_close(uploaded.state, expected.parts[part].state, rtol=1e-4, atol=1e-5)
    assert (found.forward, found.backward) == (expected.forward, expected.backward)
    assert found.sums.keys() == expected.sums.keys()
    for name, pair in found.sums.items():
        assert pair == pytest.approx(expected.sums[name], rel=1e-3, abs=1e-4), name
    torch.testing.assert_close(found.statistics, expected.statistics, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.kept, expected.kept, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.pseudo_index, expected.pseudo_index)
    if expected.pseudo is not None:
        assert found.pseudo is not None
        assert torch.equal(found.pseudo.label, expected.pseudo.label)


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the stacks that were trained."""
    seen: list[int] = []

    class Spied(Stack):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            seen.append(len(next(iter(self.state.values()))))

    monkeypatch.setattr(client_module, "Stack", Spied)
    return seen


@pytest.mark.parametrize(
    ("graphs", "prior"),
    [(False, "none"), (True, "none"), (True, "em")],
    ids=["stack", "stack and graphs", "stack and graphs with client priors"],
)
@pytest.mark.parametrize(("name", "round_number"), rounds())
def test_a_round_of_a_stack_is_that_of_each_client(
    name: str, round_number: int, graphs: bool, prior: str, stacks: list[int]
) -> None:
    recipe, state = recipe_of(name), make_student(name).state_dict()
    config = TrainingConfig(local_steps=3, batch_size=4, momentum=0.5, weight_decay=0.01, max_grad_norm=1.0)
    trainer = Trainer(make_student(name, 5), make_student(name, 6), STRONG, config, METHODS[name].metrics)
    trainer = replace(trainer, prior=PriorConfig(prior))
    locals_ = clients_of(name, recipe, state, round_number)
    alone = [train_clients(recipe, trainer, state, [each], round_number)[0] for each in locals_]
    assert stacks == []
    if graphs:
        trainer = replace(trainer, graphs=Graphs(repeated))
        for each in locals_[:2]:  # the first time without, the second with one
            assert_close(train_clients(recipe, trainer, state, [each], round_number)[0], alone[each.seed])
        train_clients(recipe, trainer, state, locals_, round_number)
    together = train_clients(recipe, trainer, state, locals_, round_number)
    assert set(stacks) <= {CLIENTS}
    steps = [phase for phase in recipe.phases(round_number) if phase.steps != 0]
    assert stacks or not steps
    for found, expected in zip(together, alone, strict=True):
        assert_close(found, expected)


def repeated(step: Callable[[], Any]) -> Callable[[], Any]:
    """In place of a CUDA graph: runs the step again, and returns its results in the same memory."""
    step()
    return step


def labels_only(student: Model, teachers: object, batch: Batch) -> Step:
    logits, labels = student(batch.labeled.views["weak"]), batch.labeled.candidates.float()
    loss = -(logits.log_softmax(-1) * labels).sum(-1).mean()
    return Step(loss, {"train/loss": torch.stack([loss.detach(), torch.ones(())])}, torch.ones(()) * len(labels))


def bright_only(student: Model, teachers: object, batch: Batch) -> Step:
    """Uses no sample of a batch whose first is dark: of some clients' steps but not of others'."""
    step, images = labels_only(student, teachers, batch), batch.labeled.views["weak"]
    used = (images[0].mean() > images.mean()).float()
    return step._replace(loss=step.loss * used, examples=used * len(images))


def recipe_with(*phases: Phase) -> Recipe:
    return Recipe((Stage(phases),), uses=LabelKinds.TRUE)


def three(labeled: tuple[int, int, int] = (10, 10, 10), n: int = 30) -> list[LocalRound]:
    return [LocalRound(client(n, count)[0], seed, {}) for seed, count in enumerate(labeled)]


def both_ways(
    recipe: Recipe, config: TrainingConfig, locals_: list[LocalRound], build: Callable[[], nn.Module] = net
) -> tuple[list[ClientUpdate], list[ClientUpdate]]:
    state = {name: value.clone() for name, value in build().state_dict().items()}
    trainer = Trainer(build(), build(), TRANSFORM, config)
    alone = [train_clients(recipe, trainer, state, [each], 1)[0] for each in locals_]
    return train_clients(recipe, trainer, state, locals_, 1), alone


@pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, momentum=0.9, nesterov=True, weight_decay=0.1),
        replace(CONFIG, optimizer="adamw", lr=0.01, weight_decay=0.1),
        replace(CONFIG, max_grad_norm=0.1),
        replace(CONFIG, prox_mu=0.5),
    ],
    ids=["momentum", "adamw", "clipped", "fedprox"],
)
def test_optimisers_keep_each_clients_moments_where_a_client_has_no_sample(
    config: TrainingConfig, stacks: list[int]
) -> None:
    recipe = recipe_with(Phase("train", bright_only))
    together, alone = both_ways(recipe, config, three())
    assert stacks == [3]
    used = {update.parts["model"].weight for update in alone}
    assert len(used) > 1  # some took steps that others did not
    for found, expected in zip(together, alone, strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_without_a_sample_moves_nothing_though_its_gradient_is_not_finite(
    momentum: float, stacks: list[int]
) -> None:
    def undefined_where_unused(student: Model, teachers: object, batch: Batch) -> Step:
        step = bright_only(student, teachers, batch)
        return step._replace(loss=step.loss * torch.where(step.examples > 0, 1.0, torch.nan))

    recipe = recipe_with(Phase("train", undefined_where_unused))
    together, alone = both_ways(recipe, replace(CONFIG, momentum=momentum), three())
    assert stacks == [3]
    for found, expected in zip(together, alone, strict=True):
        assert all(value.isfinite().all() for value in found.parts["model"].state.values())
        assert_close(found, expected)


def test_a_client_that_diverges_changes_no_other_of_its_stack(stacks: list[int]) -> None:
    config = replace(CONFIG, momentum=0.9, max_grad_norm=0.1, prox_mu=0.1)
    locals_ = [each._replace(data=replace(each.data, images=each.data.images.float())) for each in three()]
    spoiled = replace(locals_[1].data, images=locals_[1].data.images * torch.nan)
    recipe = recipe_with(Phase("train", labels_only))
    expected, _ = both_ways(recipe, config, locals_)
    found, _ = both_ways(recipe, config, [locals_[0], locals_[1]._replace(data=spoiled), locals_[2]])
    assert stacks == [3, 3]
    assert not found[1].parts["model"].state["1.weight"].isfinite().all()
    for place in (0, 2):
        assert found[place].sums == expected[place].sums
        for name, value in found[place].parts["model"].state.items():
            assert torch.equal(value, expected[place].parts["model"].state[name])


def test_the_first_steps_of_adamw_are_corrected_in_double_precision() -> None:
    """1 - 0.999 in float32 is off by 1e-5 of itself, and a first step, which is `lr`, by half of that."""
    config = replace(CONFIG, optimizer="adamw", lr=1.0, local_steps=1)
    together, alone = both_ways(recipe_with(Phase("train", labels_only)), config, three())
    for found, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(
            found.parts["model"].state, expected.parts["model"].state, rtol=1e-6, atol=1e-6, check_stride=False
        )


def test_parts_that_are_trained_alone_penalties_and_further_updates(stacks: list[int]) -> None:
    last = Update(labels_only, trains=lambda names: names[-1:], penalty=lambda named: named["3.bias"].square().sum())
    phase = Phase("train", labels_only, trains=lambda names: names[:1], then=(last,), proximal=lambda p: 1 / p.numel())
    together, alone = both_ways(recipe_with(phase), CONFIG, three())
    assert stacks == [3]
    for found, expected in zip(together, alone, strict=True):
        assert_close(found, expected)


def test_clients_with_fewer_steps_leave_the_stack(stacks: list[int]) -> None:
    """One pass over 8, 20 and 12 labelled samples in batches of 4: 2, 5 and 3 steps."""
    config = replace(CONFIG, local_steps=None, local_epochs=1, momentum=0.5)
    together, alone = both_ways(recipe_with(Phase("train", labels_only)), config, three((8, 20, 12)))
    assert stacks == [3]
    assert [update.forward for update in together] == [8, 20, 12]
    for found, expected in zip(together, alone, strict=True):
        assert_close(found, expected)


def test_clients_with_steps_of_other_shapes_train_alone(stacks: list[int]) -> None:
    """Two have fewer labelled samples than a batch."""
    together, alone = both_ways(recipe_with(Phase("train", labels_only, draw=BOTH)), CONFIG, three((10, 3, 10)))
    assert stacks == [2]
    for found, expected in zip(together, alone, strict=True):
        assert_close(found, expected)


def normalised() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, CLASSES))


def test_running_statistics_of_batchnorm_are_each_clients_own(stacks: list[int]) -> None:
    together, alone = both_ways(recipe_with(Phase("train", bright_only)), CONFIG, three(), normalised)
    assert stacks == [3]
    means = [update.parts["model"].state["1.running_mean"] for update in together]
    assert not torch.equal(means[0], means[1])
    for found, expected in zip(together, alone, strict=True):
        assert_close(found, expected)


def test_networks_compute_in_bfloat16_where_asked_and_losses_do_not(stacks: list[int]) -> None:
    seen: list[torch.dtype] = []

    def noting(student: Model, teachers: object, batch: Batch) -> Step:
        step = labels_only(student, teachers, batch)
        seen.append(student(batch.labeled.views["weak"]).dtype)
        return step

    recipe = recipe_with(Phase("train", noting))
    exact, _ = both_ways(recipe, CONFIG, three())
    together, alone = both_ways(recipe, replace(CONFIG, precision="bfloat16"), three())
    assert set(seen) == {torch.float32}
    for rough, plain, expected in zip(together, exact, alone, strict=True):
        first, other = rough.parts["model"].state["1.weight"], plain.parts["model"].state["1.weight"]
        assert not torch.equal(first, other)
        torch.testing.assert_close(first, other, rtol=0.05, atol=0.02)
        torch.testing.assert_close(first, expected.parts["model"].state["1.weight"], rtol=0.05, atol=0.02)


def test_a_phase_that_is_new_in_every_round_is_never_captured() -> None:
    captured: list[int] = []

    def capture(step: Callable[[], Any]) -> Callable[[], Any]:
        captured.append(1)
        return repeated(step)

    growing = Recipe((Stage(lambda number: (Phase("train", labels_only),)),), uses=LabelKinds.TRUE)
    for recipe, expected in ((growing, 0), (recipe_with(Phase("train", labels_only)), 1)):
        trainer = Trainer(net(), net(), TRANSFORM, CONFIG, graphs=Graphs(capture))
        for _ in range(4):
            train_clients(recipe, trainer, net().state_dict(), three()[:1], 1)
        assert len(captured) == expected


def test_networks_that_draw_random_numbers_are_not_stacked() -> None:
    assert "layer 0 draws random numbers" in str(why_not(nn.Sequential(nn.Dropout(0.5))))
    assert why_not(nn.Sequential(nn.Dropout(0.0), nn.BatchNorm1d(3))) is None
    layer = nn.Linear(3, 3)
    assert why_not(nn.Sequential(layer, layer)) == "layers share weights"


def test_steps_that_cannot_be_captured_run_without_a_graph(caplog: pytest.LogCaptureFixture) -> None:
    def capture(step: Callable[[], Any]) -> Callable[[], Any]:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    recipe = recipe_with(Phase("train", labels_only))
    alone = [train_clients(recipe, Trainer(net(), net(), TRANSFORM, CONFIG), net().state_dict(), three()[:1], 1)[0]]
    trainer = Trainer(net(), net(), TRANSFORM, CONFIG, graphs=Graphs(capture))
    with caplog.at_level("WARNING", "fedlabel"):
        found = [train_clients(recipe, trainer, net().state_dict(), three()[:1], 1)[0] for _ in range(3)]
    for each in found:
        assert_close(each, alone[0])
    assert caplog.text.count("cannot be captured as a CUDA graph: operation not permitted") == 1


@pytest.mark.parametrize(
    ("module", "size"),
    [
        (nn.Linear(10, 10), 32),
        (nn.Linear(IN_CACHE // 4 // 4 - 1, 1), 4),
        (nn.Linear(IN_CACHE // 2, 1), 1),
        (nn.Conv2d(1, 1, 1), 1),
    ],
)
def test_how_many_are_stacked_depends_on_the_network(module: nn.Module, size: int) -> None:
    assert automatic_size(module) == size


def views(images: Tensor, *seeds: int) -> Tensor:
    from fedlabel.seeding import Draws

    draws = Draws(*(torch.Generator().manual_seed(seed) for seed in seeds))
    return STRONG.views(images, ("strong",), draws)["strong"]


def test_a_clients_views_do_not_depend_on_who_shares_the_batch() -> None:
    images = torch.randint(256, (8, 1, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    together = views(images, 3, 5)
    assert torch.equal(together, torch.cat([views(images[:4], 3), views(images[4:], 5)]))
    assert not torch.equal(together, torch.cat([views(images[:4], 3), views(images[4:], 3)]))
