"""Forward correction against worked numbers and a slow derivation, its limits, and the federated anchor estimate."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlabel.config import ConfigError, load_config, parse_config, to_yaml
from fedlabel.data.labels.supervision import Supervision
from fedlabel.learning.client import ClientData, ClientUpdate, Trainer, train_client
from fedlabel.methods.batch import State, Survey
from fedlabel.methods.forward import AnchorTransition, Forward, anchor_rows, report_anchors
from fedlabel.methods.losses import labels_loss
from tests.methods.recipes import task
from tests.methods.rounds import TRANSFORM
from tests.methods.sets import Known, assert_stacks, random_known, sets
from tests.methods.tables import (
    CLASSES,
    ROUND,
    LabelsOnly,
    assert_all_moved,
    client,
    logits_of,
    model,
    net,
    same,
    softmax,
    train_round,
)

SEEDS = range(5)
MATRIX = ((0.8, 0.1, 0.1), (0.2, 0.7, 0.1), (0.1, 0.3, 0.6))


def random_matrix(seed: int, classes: int = 4) -> Tensor:
    return (
        2 * torch.eye(classes) + torch.rand(classes, classes, generator=torch.Generator().manual_seed(seed))
    ).softmax(1)


def start(method: Forward, num_classes: int = 3) -> State:
    """What the server shares in round 1."""
    return method.recipe(task(num_classes)).shared.start()


def noisy_client() -> ClientData:
    data = client(30, 20)
    known = data.supervision
    return ClientData(data.images, Supervision.without_bags(known.candidates, known.labeled, known.annotations))


def test_loss_by_hand() -> None:
    """p = (.5, .3, .2), T as above, noisy label 1: .5 * .1 + .3 * .7 + .2 * .3 = .32, -ln .32 = 1.139434.

    q = (.15625, .65625, .1875), and the gradient is p - q. (With T transposed: .5 * .2 + .3 * .7 + .2 * .1 = .33.) The
    same label, certain: -ln .3 = 1.203973. The mean is 1.171704; a third sample, without a label, is not in it.
    """
    method = Forward(kind="given", matrix=MATRIX)
    known = Known(
        logits_of([0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.1, 0.1, 0.8]),
        sets([1], [1], [0, 1, 2], classes=3),
        torch.tensor([True, False, False]),
    )
    step, gradient = known.run(method.loss, start(method))
    assert step.loss.item() == pytest.approx(1.171704, abs=1e-5)
    assert step.examples.item() == 2
    assert gradient[0].tolist() == pytest.approx([0.34375 / 2, -0.35625 / 2, 0.0125 / 2], abs=1e-6)
    assert gradient[1].tolist() == pytest.approx([0.25, -0.35, 0.1], abs=1e-6)
    assert gradient[2].tolist() == [0, 0, 0]


def test_symmetric_matrix_by_hand() -> None:
    """A share .3 drawn anew from all 3 classes: .7 + .1 on the diagonal, .1 elsewhere."""
    recipe = Forward(kind="symmetric", noise_rate=0.3).recipe(task())
    shared = recipe.shared.start()
    matrices = recipe.inspect(shared)["noise_matrix"]
    assert matrices.shape == (1, 3, 3)
    assert matrices.flatten().tolist() == pytest.approx([0.8, 0.1, 0.1, 0.1, 0.8, 0.1, 0.1, 0.1, 0.8])
    assert recipe.shared.update(shared, {}) is shared
    assert recipe.shared.statistics(shared) == {}


@pytest.mark.parametrize("seed", SEEDS)
def test_loss_and_gradient_per_sample(seed: int) -> None:
    """Where the label is noisy the gradient is p - q with q ~ p T[:, label], elsewhere p - label."""
    known, matrix = random_known(seed, several=False), random_matrix(seed)
    step, gradient = known.run(Forward().loss, {"transition": matrix})
    total = 0.0
    for i, label in enumerate(known.candidates[:-1].int().argmax(1).tolist()):
        p = softmax(known.logits[i])
        through = [p[y] * (matrix[y, label].item() if known.noisy[i] else y == label) for y in range(4)]
        total -= math.log(sum(through))
        expected = [(p[y] - through[y] / sum(through)) / 7 for y in range(4)]
        assert gradient[i].tolist() == pytest.approx(expected, abs=1e-6)
    assert step.examples.item() == 7
    assert step.loss.item() == pytest.approx(total / 7, abs=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("method", [Forward(), Forward(kind="symmetric", noise_rate=0.0)])
def test_with_the_identity_it_is_cross_entropy(seed: int, method: Forward) -> None:
    """Before T is estimated, too."""
    known = random_known(seed, several=False)
    shared = start(method, 4)
    torch.testing.assert_close(shared["transition"], torch.eye(4))
    ours, gradient = known.run(method.loss, shared)
    theirs, expected = known.run(labels_loss)
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(gradient, expected)


def test_clients_stack() -> None:
    known = [random_known(seed, several=False) for seed in range(3)]
    assert_stacks(Forward().loss, known, [{"transition": random_matrix(seed)} for seed in range(3)])


# -------------------------------------------------------------------------------------------------- the anchor estimate


def test_anchor_rows_by_hand() -> None:
    """Class 0: the second sample (.7); class 1: the third (.6). Class 2: .3 is the most, of a sample predicted 0: none.

    The last sample would be the best for class 2, but has no label.
    """
    logits = logits_of([0.6, 0.1, 0.3], [0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.1, 0.1, 0.8])
    rows, found = anchor_rows(logits, torch.tensor([True, True, True, False]))
    assert rows.flatten().tolist() == pytest.approx([0.7, 0.2, 0.1, 0.3, 0.6, 0.1, 0, 0, 0])
    assert found.tolist() == [1, 1, 0]
    rows, found = anchor_rows(logits, torch.zeros(4).bool())
    assert rows.tolist() == torch.zeros(3, 3).tolist()
    assert found.tolist() == [0, 0, 0]


def reported(shared: State, probabilities: list[list[float]]) -> State:
    """What a client with these predictions of its samples, all of them labelled, sends."""
    candidates = sets(*([0] for _ in probabilities), classes=3)
    survey = Survey(lambda teacher, view: logits_of(*probabilities), Supervision.certain(candidates), shared)
    return AnchorTransition(3).statistics(report_anchors(survey).memory or shared)


def test_the_server_averages_rows_once() -> None:
    """Two clients report class 0, (.7, .2, .1) and (.9, .1, 0): (.8, .15, .05). One reports class 1, nobody class 2."""
    anchors = AnchorTransition(3)
    shared = anchors.start()
    first = reported(shared, [[0.7, 0.2, 0.1], [0.3, 0.6, 0.1]])
    second = reported(shared, [[0.9, 0.1, 0.0]])
    nobody = anchors.statistics(shared)
    total = {name: first[name] + second[name] + nobody[name] for name in first}
    assert total["anchor_counts"].tolist() == [2, 1, 0]
    after = anchors.update(shared, total)
    expected = [0.8, 0.15, 0.05, 0.3, 0.6, 0.1, 0, 0, 1]
    assert after["transition"].flatten().tolist() == pytest.approx(expected)
    assert after["estimated"].item() == 1
    assert torch.equal(shared["transition"], torch.eye(3))
    # From now on nobody reports, and nothing changes it.
    again = reported(after, [[0.1, 0.8, 0.1]])
    assert again["anchor_counts"].sum() == 0
    assert anchors.update(after, total) is after
    assert anchors.update(after, again) is after
    # A round without any report leaves it to the next one.
    assert anchors.update(shared, {name: 0 * value for name, value in total.items()})["estimated"].item() == 0
    assert torch.equal(anchors.update(shared, {})["transition"], torch.eye(3))


def train_at(method: Forward, round_number: int, shared: State, data: ClientData) -> ClientUpdate:
    trainer = Trainer(net(5), net(6), TRANSFORM, ROUND)
    recipe = method.recipe(task(CLASSES))
    return train_client(recipe, trainer, net().state_dict(), data, round_number, 7, shared)


def test_clients_report_in_the_last_round_of_the_warm_up() -> None:
    """With the model they received, over their labelled samples; and train on plain cross-entropy until T is there."""
    method, data = Forward(warmup_rounds=3), noisy_client()
    shared = start(method)
    early = train_at(method, 2, shared, data)
    assert early.statistics["anchor_counts"].sum() == 0
    last = train_at(method, 3, shared, data)
    logits = net()(data.images / 255).detach()
    rows, found = anchor_rows(logits, data.supervision.labeled)
    assert found.sum() > 0
    torch.testing.assert_close(last.statistics["anchor_rows"], rows)
    assert torch.equal(last.statistics["anchor_counts"], found)
    assert last.kept == {}
    assert same(model(last), model(early))  # T is the identity in both
    estimated = AnchorTransition(CLASSES).update(shared, last.statistics)
    corrected = train_at(method, 4, estimated, data)
    assert corrected.statistics["anchor_counts"].sum() == 0
    assert not same(model(corrected), model(early))
    without = ClientData(data.images, Supervision.certain(torch.ones(30, CLASSES).bool()))
    assert train_at(method, 3, shared, without).statistics["anchor_counts"].sum() == 0


def test_a_round_moves_every_parameter_and_certain_labels_make_it_cross_entropy() -> None:
    method = Forward(kind="given", matrix=MATRIX)
    assert_all_moved(train_round(method, noisy_client()))
    certain = train_round(method)
    for name, value in model(train_round(LabelsOnly())).items():
        torch.testing.assert_close(model(certain)[name], value)


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "pairs"}, r"`method.kind` \(=pairs\) must be one of symmetric, given, anchor"),
        ({"noise_rate": 1.0}, r"`method.noise_rate` \(=1.0\) must lie in \[0, 1\)"),
        ({"warmup_rounds": 1}, r"`method.warmup_rounds` \(=1\) must be at least 2"),
        ({"kind": "given"}, r"`method.matrix` is missing: `method.kind` \(=given\) takes T from it, e.g\."),
        ({"matrix": MATRIX}, r"`method.matrix` \(3 rows\) would do nothing with `method.kind` \(=anchor\)"),
        ({"kind": "given", "matrix": MATRIX[:2]}, r"must be square: row 0 has 3 entries, there are 2 rows"),
        (
            {"kind": "given", "matrix": ((0.9, 0.1), (0.2, 0.7))},
            r"`method.matrix`, row 1 \(=\[0.2, 0.7\]\), must hold numbers in \[0, 1\] whose sum is 1",
        ),
        (
            {"kind": "given", "matrix": ((1.2, -0.2), (0, 1))},
            r"row 0 \(=\[1.2, -0.2\]\), must hold numbers in \[0, 1\]",
        ),
    ],
)
def test_wrong_hyper_parameters_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Forward(**fields)


def test_a_matrix_of_another_number_of_classes_is_an_error() -> None:
    method = Forward(kind="given", matrix=MATRIX)
    with pytest.raises(ValueError, match=r"`method.matrix` \(3 rows\) .* as the data set has classes \(=4\)"):
        method.recipe(task(4))
    assert start(method)["transition"].shape == (3, 3)


def test_the_matrix_can_be_configured() -> None:
    overrides = ["method.name=forward", "method.kind=given", "method.matrix=[[.9,.1],[.25,.75]]"]
    config = load_config([], overrides)
    assert config.method == Forward(kind="given", matrix=((0.9, 0.1), (0.25, 0.75)))
    assert hash(config.method) == hash(replace(config.method))
    assert parse_config(to_yaml(config)).method == config.method
    for wrong in ("0.8", "[0.8,0.2]", "[[1,0],[0,a]]"):
        with pytest.raises(ConfigError, match=r"`method.matrix` \(=.*\) must be a list of lists of numbers, e\.g\."):
            load_config([], [*overrides[:2], f"method.matrix={wrong}"])
    with pytest.raises(ConfigError, match="row 1"):
        load_config([], [*overrides[:2], "method.matrix=[[.9,.1],[.25,.85]]"])


def test_a_run_that_ends_in_the_warm_up_is_refused() -> None:
    overrides = ["method.name=forward", "method.warmup_rounds=5"]
    load_config([], [*overrides, "num_rounds=6"])
    load_config([], [*overrides, "num_rounds=2", "method.kind=symmetric"])
    with pytest.raises(ConfigError, match=r"`num_rounds` \(=5\) ends before anything is corrected.*at least 6"):
        load_config([], [*overrides, "num_rounds=5"])
