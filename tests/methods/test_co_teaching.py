"""Co-teaching against worked numbers and a slow derivation, its limits, and a round of two networks."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from fedlabel.config import load_config
from fedlabel.experiment import Experiment
from fedlabel.learning.client import ClientData, ClientUpdate, Trainer, train_client, train_server
from fedlabel.methods.batch import StateDict
from fedlabel.methods.co_teaching import CoTeaching, smallest
from fedlabel.methods.losses import labels_loss
from fedlabel.methods.recipe import Recipe
from fedlabel.methods.supervised import Supervised
from fedlabel.models.twins import Twins
from tests.methods.recipes import task
from tests.methods.rounds import TRANSFORM
from tests.methods.sets import Known, assert_stacks, sets
from tests.methods.tables import CLASSES, ROUND, LabelsOnly, client, logits_of, model, net, softmax

SEEDS = range(5)


def known_to_two(seed: int, n: int = 8, classes: int = 4) -> Known:
    """Random logits of two networks, and labels; the last sample has none."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, 2, classes, generator=generator)
    candidates = torch.randint(classes, (n, 1), generator=generator) == torch.arange(classes)
    candidates[-1] = True
    return Known(logits, candidates, torch.arange(n) % 2 == 0)


def test_loss_by_hand() -> None:
    """Three samples of label 0, R = .5: floor(1.5) = 1 is kept.

    The first network gives the label .8, .5, .2 and finds the first sample easiest, which the second network is taught:
    it gives it .1, loss -ln .1 = 2.302585. The second gives .1, .4, .9 and picks the third, of which the first gives
    the label .2: -ln .2 = 1.609438. Together 3.912023. (Each on its own pick: -ln .8 - ln .9 = .328504.)
    """
    first = logits_of([0.8, 0.2], [0.5, 0.5], [0.2, 0.8])
    second = logits_of([0.1, 0.9], [0.4, 0.6], [0.9, 0.1])
    known = Known(torch.stack([first, second], 1), sets([0], [0], [0], classes=2))
    step, gradient = known.run(partial(CoTeaching().loss, share=0.5))
    assert step.loss.item() == pytest.approx(3.912023, abs=1e-5)
    assert step.examples.item() == 1
    assert step.metrics["train/kept"].tolist() == pytest.approx([1, 3])
    assert step.metrics["train/loss_supervised"].tolist() == pytest.approx([3.912023, 2], abs=1e-5)
    expected = torch.zeros(3, 2, 2)
    expected[2, 0] = torch.tensor([-0.8, 0.8])
    expected[0, 1] = torch.tensor([-0.9, 0.9])
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("share", [1.0, 0.7, 0.5, 0.01])
def test_loss_and_gradient_per_sample(seed: int, share: float) -> None:
    """Sorted losses; 7 samples have a label, so 7, 4, 3 or at least 1 are kept."""
    known = known_to_two(seed)
    step, gradient = known.run(partial(CoTeaching().loss, share=share))
    labels = known.candidates[:-1].int().argmax(1).tolist()
    number = max(1, math.floor(share * 7 + 1e-9))
    losses = [[-math.log(softmax(known.logits[i, k])[labels[i]]) for i in range(7)] for k in range(2)]
    total, expected = 0.0, torch.zeros(8, 2, 4)
    for k in range(2):
        picked = sorted(range(7), key=lambda i: losses[1 - k][i])[:number]
        total += sum(losses[k][i] for i in picked) / number
        for i in picked:
            for c, p in enumerate(softmax(known.logits[i, k])):
                expected[i, k, c] = (p - (c == labels[i])) / number
    assert step.loss.item() == pytest.approx(total, abs=1e-5)
    assert step.examples.item() == number
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_keeping_all_is_cross_entropy_of_each(seed: int) -> None:
    known = known_to_two(seed)
    ours, gradient = known.run(CoTeaching().loss)
    total = 0.0
    for k in range(2):
        theirs, expected = Known(known.logits[:, k].detach(), known.candidates).run(labels_loss)
        total += theirs.loss.item()
        torch.testing.assert_close(gradient[:, k], expected)
        assert theirs.examples == ours.examples
    assert ours.loss.item() == pytest.approx(total, abs=1e-5)


def kept(losses: list[float], share: float, counted: list[bool] | None = None) -> list[bool]:
    mask = torch.tensor(counted if counted is not None else [True] * len(losses))
    return smallest(torch.tensor(losses)[:, None], mask, share)[:, 0].tolist()


def test_how_many_are_kept() -> None:
    """floor(R n), at least 1; ties go to the first; 1 - .9 of 20 is 2, though 1.99999... in floating point."""
    assert kept([3.0, 1.0, 2.0], 0.67) == [False, True, True]
    assert kept([3.0, 1.0, 2.0], 0.66) == [False, True, False]
    assert kept([3.0, 1.0, 2.0], 0.0) == [False, True, False]
    assert kept([1.0, 1.0, 1.0, 1.0], 0.5) == [True, True, False, False]
    assert kept([0.0, 1.0, 2.0], 0.5, [False, True, True]) == [False, True, False]
    assert kept([0.0, 1.0], 1.0, [False, False]) == [False, False]
    assert sum(kept(list(range(10, 30)), 1 - 0.9)) == 2
    assert sum(kept(list(range(10)), 1 - 0.3)) == 7
    assert smallest(torch.zeros(0, 2), torch.zeros(0).bool(), 0.5).shape == (0, 2)


def test_clients_stack() -> None:
    assert_stacks(partial(CoTeaching().loss, share=0.6), [known_to_two(seed) for seed in range(3)], [{}] * 3)


def test_share_of_a_round() -> None:
    """T_k = 4, forget_rate .4: 1, .9, .8, .7, .6, .6, ..."""
    method = CoTeaching(forget_rate=0.4, ramp_rounds=4)
    assert [method.share(t) for t in range(1, 7)] == pytest.approx([1, 0.9, 0.8, 0.7, 0.6, 0.6])
    assert CoTeaching(forget_rate=0.4, ramp_rounds=0).share(1) == pytest.approx(0.6)


# ---------------------------------------------------------------------------------------------------- two real networks


def twins(first: int, second: int) -> Twins:
    return Twins([net(first), net(second)])


def recipe_of(method: CoTeaching) -> Recipe:
    return method.recipe(task(CLASSES))


def train_twins(method: CoTeaching, round_number: int = 1, data: ClientData | None = None) -> ClientUpdate:
    trainer = Trainer(twins(5, 6), twins(7, 8), TRANSFORM, ROUND)
    start = twins(1, 2).state_dict()
    return train_client(recipe_of(method), trainer, start, client() if data is None else data, round_number, 7)


def alone(seed: int) -> StateDict:
    trainer = Trainer(net(5), net(6), TRANSFORM, ROUND)
    return model(train_client(LabelsOnly().recipe(task()), trainer, net(seed).state_dict(), client(), 1, 7))


def test_a_round_that_forgets_nothing_is_two_rounds_of_cross_entropy() -> None:
    for method in (CoTeaching(forget_rate=0.0), CoTeaching(forget_rate=0.9)):  # in round 1 nothing is left out yet
        update = train_twins(method)
        assert update.parts["model"].weight == 5 * 4
        assert (update.forward, update.backward) == (2 * 5 * 4, 2 * 5 * 4)
        for place, seed in enumerate((1, 2)):
            for name, value in alone(seed).items():
                torch.testing.assert_close(model(update)[f"networks.{place}.{name}"], value)


def test_a_late_round_leaves_samples_out_and_moves_every_parameter() -> None:
    early, late = train_twins(CoTeaching(forget_rate=0.5)), train_twins(CoTeaching(forget_rate=0.5), 100)
    assert late.parts["model"].weight == 5 * 2
    assert late.sums["train/kept"] == pytest.approx([10, 20])
    start = twins(1, 2).state_dict()
    for name, value in model(late).items():
        assert not torch.equal(value, start[name]), name
        assert not torch.equal(value, model(early)[name]), name
    assert train_twins(CoTeaching(), data=client(30, 0)).parts["model"].weight == 0


def test_a_server_with_labels_trains_both_networks_on_all() -> None:
    trainer = Trainer(twins(5, 6), twins(7, 8), TRANSFORM, replace(ROUND, local_steps=1))
    start = twins(1, 2).state_dict()
    after = train_server(recipe_of(CoTeaching(forget_rate=0.9)), trainer, start, client(4, 4), 7)
    for place, seed in enumerate((1, 2)):
        single = Trainer(net(5), net(6), TRANSFORM, trainer.config)
        expected = train_server(Supervised().recipe(task()), single, net(seed).state_dict(), client(4, 4), 7)
        for name, value in expected.items():
            torch.testing.assert_close(after[f"networks.{place}.{name}"], value)


TINY = (
    *("num_clients=3", "partition.kind=iid", "supervision.label_rate=0.1", "model.name=mlp", "device=cpu"),
    *("training.local_steps=2", "training.batch_size=8"),
)


def test_an_experiment_builds_two_networks_of_different_weights() -> None:
    """The first is what other methods start from; the global model that is evaluated is the mean of both."""
    experiment = Experiment(load_config([], [*TINY, "method.name=co_teaching"]))
    single = Experiment(load_config([], [*TINY, "method.name=supervised"]))
    state = experiment.initial_state
    assert len(state) == 2 * len(single.initial_state)
    for name, value in single.initial_state.items():
        assert torch.equal(state[f"networks.0.{name}"], value)
        assert not torch.equal(state[f"networks.1.{name}"], value)
    for name, value in experiment.teacher.state_dict().items():
        assert torch.equal(value, state[name])
    update = experiment.train(0, state, 1)
    assert update.parts["model"].weight > 0
    trained = update.parts["model"].state
    networks = [{k: trained[f"networks.{i}.{k}"] for k in single.initial_state} for i in (0, 1)]
    first, second = (single.evaluate(1, {"model": state}) for state in networks)
    # By Jensen's inequality the mean's loss is below the mean of the losses.
    assert 0 < experiment.evaluate(1, {"model": trained}).loss < (first.loss + second.loss) / 2


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("forget_rate", 1.0, r"`method.forget_rate` \(=1.0\) must lie in \[0, 1\)"),
        ("forget_rate", -0.1, r"`method.forget_rate` \(=-0.1\) must lie in \[0, 1\)"),
        ("ramp_rounds", -1, r"`method.ramp_rounds` \(=-1\) must be at least 0"),
    ],
)
def test_wrong_hyper_parameters_are_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CoTeaching(**{field: value})
