"""FedTriNet: the three networks' weights, what they label and when, and the limit of supervised averaging."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fedlabel.data.labels.supervision import Supervision
from fedlabel.learning.client import ClientData, ClientUpdate, Trainer, train_client, train_server
from fedlabel.learning.training_config import TrainingConfig
from fedlabel.methods import fedtrinet
from fedlabel.methods.batch import State, StateDict, Survey
from fedlabel.methods.fedtrinet import FedTriNet, head_names, label_together
from fedlabel.methods.recipe import BySample, Memory, Method, Phase, Recipe
from fedlabel.methods.uploads import ModelPart, PhaseResult
from fedlabel.models import MODELS, ModelConfig, build_model
from tests.methods.recipes import task
from tests.methods.rounds import TRANSFORM
from tests.methods.tables import (
    CLASSES,
    NOTHING,
    ROUND,
    LabelsOnly,
    Table,
    best,
    client,
    labeled_mean,
    logits_of,
    model,
    net,
    random_table,
    same,
    softmax,
)

SEEDS = range(5)
SEED = 7
HEAD = {"3.weight", "3.bias"}
"""The last layer of `net()`; "1.weight" and "1.bias" are the feature layers."""
FEATURES = {"1.weight", "1.bias"}


def recipe_of(method: Method) -> Recipe:
    return method.recipe(task(CLASSES))


def phases(method: Method, round_number: int) -> tuple[Phase, ...]:
    return recipe_of(method).phases(round_number)


def memory_of(method: Method) -> Memory:
    return recipe_of(method).memory


def weights(seed: int) -> StateDict:
    return {name: value.clone() for name, value in net(seed).state_dict().items()}


def old(state: StateDict) -> State:
    """The memory of a client whose own model is `state`."""
    return {f"old/{name}": value for name, value in state.items()}


def differing(first: StateDict, second: StateDict) -> set[str]:
    return {name for name in first if not torch.equal(first[name], second[name])}


# Which weights.


def test_head_is_the_last_layers_in_the_models_order() -> None:
    names = ["conv.weight", "norm.weight", "norm.bias", "block.fc.weight", "block.fc.bias", "out.weight"]
    assert head_names(names, 1) == {"out.weight"}
    assert head_names(names, 2) == {"out.weight", "block.fc.weight", "block.fc.bias"}
    assert head_names(names, 4) == head_names(names, 9) == set(names)
    assert head_names(net().state_dict(), 1) == HEAD
    # A layer's buffers belong to it, so that head and features are the same in a state as among the parameters.
    normed = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    parameters = head_names([name for name, _ in normed.named_parameters()], 2)
    assert head_names(normed.state_dict(), 2) & {name for name, _ in normed.named_parameters()} == parameters


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_one_head_layer_is_the_classifier_of_every_network(name: str, norm: str) -> None:
    state = build_model(ModelConfig(name=name, norm=norm), (1, 8, 8), 7, 0).state_dict()
    head = head_names(state, 1)
    assert {state[key].shape[0] for key in head} == {7}
    assert len({key.rpartition(".")[0] for key in head}) == 1


def test_old_and_crossed_network_by_hand() -> None:
    """O is the kept model; N takes the received features and the kept head."""
    received = {"conv": torch.tensor(1.0), "body.w": torch.tensor(2.0), "fc.w": torch.tensor(3.0)}
    kept = {"conv": torch.tensor(10.0), "body.w": torch.tensor(20.0), "fc.w": torch.tensor(30.0)}
    states = memory_of(FedTriNet()).models(received, old(kept))
    assert states == {"old": kept, "crossed": {"conv": 1.0, "body.w": 2.0, "fc.w": 30.0}}
    two = memory_of(FedTriNet(head_layers=2)).models(received, old(kept))
    assert two["crossed"] == {"conv": 1, "body.w": 20, "fc.w": 30}
    # A client that never trained has the received model for all three.
    memory = memory_of(FedTriNet()).start(torch.ones(4, 3, dtype=torch.bool))
    assert memory["pseudo_label"].tolist() == [-1] * 4
    assert memory_of(FedTriNet()).models(received, memory) == {"old": received, "crossed": received}


def test_a_head_of_all_layers_is_refused() -> None:
    """`net()` has two layers with weights."""
    received = weights(1)
    assert memory_of(FedTriNet(head_layers=1)).models(received, {})["old"] == received
    for layers in (2, 3):
        with pytest.raises(ValueError, match=rf"`method.head_layers` \(={layers}\) covers all layers of the model"):
            memory_of(FedTriNet(head_layers=layers)).models(received, {})


def test_phases_before_and_after_the_warm_up() -> None:
    method = FedTriNet(warmup_rounds=2)
    assert [[(p.name, p.start) for p in phases(method, r)] for r in (1, 2, 3)] == [
        [("warmup", "crossed")],
        [("warmup", "crossed")],
        [("new", "crossed"), ("train", "global")],
    ]
    new, train = phases(method, 3)
    assert new.trains is not None
    assert set(new.trains(["1.weight", "1.bias", "3.weight", "3.bias"])) == HEAD
    assert train.trains is None
    assert train.teachers == ("global", "old", "new")
    assert [phase.draw for phase in (*phases(method, 1), new)] == [BySample(("weak",))] * 2
    assert train.draw == BySample(("weak",), ("weak",))
    assert [p.name for p in phases(FedTriNet(warmup_rounds=0), 1)] == ["new", "train"]
    assert len(phases(FedTriNet(), 40)) == 1
    assert len(phases(FedTriNet(), 41)) == 2


# What is labelled.


def test_label_together_by_hand() -> None:
    """G = (.6, .3, .1), O = (.2, .7, .1), N = (.4, .5, .1): the mean is (.4, .5, .1), class 1 with .5.

    Reaching the threshold is enough; a label once given stays, whatever the networks say now; (.5, .5) goes to 0.
    """
    probs = [torch.tensor([row, row, [0.5, 0.5, 0.0]]) for row in ([0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.4, 0.5, 0.1])]
    unknown, known = torch.tensor([-1, -1, -1]), torch.tensor([-1, 2, -1])
    label, confidence = label_together(probs, 0.4, known)
    assert label.tolist() == [1, 2, 0]
    assert confidence.tolist() == pytest.approx([0.5, 0.5, 0.5])
    assert label_together(probs, 0.501, known)[0].tolist() == [-1, 2, -1]
    assert label_together(probs, float(confidence[0]), unknown)[0].tolist() == [1, 1, 0]
    # Not a vote: one sure network outweighs two that are hardly of another mind.
    sure = [torch.tensor([[0.9, 0.1]]), torch.tensor([[0.45, 0.55]]), torch.tensor([[0.45, 0.55]])]
    assert label_together(sure, 0.0, torch.tensor([-1]))[0].tolist() == [0]


@pytest.mark.parametrize("seed", SEEDS)
def test_labels_per_sample(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = {net: 3 * torch.randn(40, 4, generator=generator) for net in ("global", "old", "new")}
    known = torch.where(torch.rand(40, generator=generator) < 0.2, torch.randint(4, (40,), generator=generator), -1)
    given = torch.rand(40, generator=generator)  # how sure the labels were when they were given
    asked = []

    def predict(teacher: str, view: str) -> Tensor:
        asked.append((teacher, view))
        return logits[teacher]

    survey = Survey(
        predict,
        Supervision.certain(torch.ones(40, 4, dtype=torch.bool)),
        {"pseudo_label": known, "confidence": given, "old/x": torch.ones(1)},
    )
    prepared = FedTriNet().prepare(survey, threshold=0.6)
    assert sorted(asked) == [("global", "clean"), ("new", "clean"), ("old", "clean")]
    assert prepared.draw is not None
    assert prepared.memory is not None
    assert prepared.pseudo is not None
    expected = []
    for i in range(40):
        summed = [sum(column) for column in zip(*(softmax(rows[i]) for rows in logits.values()), strict=True)]
        largest, label = best(summed)
        expected.append(int(known[i]) if known[i] >= 0 else label if largest >= 3 * 0.6 else -1)
        sure = given[i].item() if known[i] >= 0 else largest / 3
        assert prepared.pseudo.confidence[i].item() == pytest.approx(sure, abs=1e-6)
        assert prepared.memory["confidence"][i] == prepared.pseudo.confidence[i]
        # Where no label is given, the evaluator still sees the class that would have been.
        assert prepared.pseudo.label[i].item() == (expected[i] if expected[i] >= 0 else label)
    kept = [label >= 0 for label in expected]
    assert 8 < sum(kept) < 40
    assert prepared.memory["pseudo_label"].tolist() == expected
    assert torch.equal(prepared.memory["old/x"], torch.ones(1))
    assert prepared.draw.tolist() == prepared.pseudo.keep.tolist() == kept
    assert [prepared.targets["label"][i].item() for i in range(40) if kept[i]] == [y for y in expected if y >= 0]
    assert not prepared.pseudo.from_global.any()


def test_threshold_by_hand() -> None:
    """From .9 by .004 a round to .7 after 50; `quality_rounds` = 0 is the end at once; 0 to 0 is "switched off"."""
    method = FedTriNet()
    assert [method.threshold(r) for r in (0, 1, 25, 50, 99)] == pytest.approx([0.9, 0.896, 0.8, 0.7, 0.7])
    assert replace(method, quality_rounds=0).threshold(1) == 0.7
    assert FedTriNet(quality_start=0.0, quality_end=0.0).threshold(7) == 0.0
    rising = FedTriNet(quality_start=0.5, quality_end=0.9, quality_rounds=4)
    assert [rising.threshold(r) for r in (1, 2, 4, 5)] == pytest.approx([0.6, 0.7, 0.9, 0.9])
    # The first round after the warm-up is one round after it.
    (_, train) = phases(replace(method, warmup_rounds=3), 4)
    assert train.prepare is not None
    assert train.prepare.keywords == {"threshold": pytest.approx(0.896)}  # type: ignore[attr-defined]
    assert train.loss.keywords == {"weight": pytest.approx(0.005)}  # type: ignore[attr-defined]


def test_weight_by_hand() -> None:
    """alpha(t): 0 up to T1 = 50, .5 from T2 = 150 on, half of it at 100; a ramp of no length is a step."""
    method = FedTriNet(ramp_start=50, ramp_end=150)
    assert [method.weight(t) for t in (0, 49, 50, 75, 100, 150, 999)] == [0, 0, 0, 0.125, 0.25, 0.5, 0.5]
    assert [FedTriNet().weight(t) for t in (1, 50, 100)] == [0.005, 0.25, 0.5]
    step = FedTriNet(ramp_start=3, ramp_end=3, lambda_u=2.0)
    assert [step.weight(t) for t in (2, 3, 4)] == [0, 2, 2]
    assert FedTriNet(ramp_start=0, ramp_end=0).weight(1) == 0.5


def test_loss_by_hand() -> None:
    """Labelled p(y) = .5: .693147. Pseudo-labels 0 and 1 on weak views (.75, .25), twice: (.287682 + 1.386294) / 2 =
    .836988; with weight .25: .693147 + .209247 = .902394. The strong view is not looked at."""
    table = Table(
        torch.zeros(1, 2),
        torch.tensor([1]),
        weak=logits_of([0.75, 0.25], [0.75, 0.25]),
        strong=torch.full((2, 2), math.nan),
    )
    step = FedTriNet().loss(table.student, NOTHING, table.batch(targets={"label": torch.tensor([0, 1])}), weight=0.25)
    assert step.loss.item() == pytest.approx(0.902394, abs=1e-6)
    assert step.examples.item() == 3
    assert step.metrics["train/loss_supervised"].tolist() == pytest.approx([0.693147, 1])
    assert step.metrics["train/loss_unsupervised"].tolist() == pytest.approx([1.673976, 2])


@pytest.mark.parametrize("seed", SEEDS)
def test_loss_and_gradient_per_sample(seed: int) -> None:
    table = random_table(seed)
    given = torch.randint(4, (8,), generator=torch.Generator().manual_seed(seed))
    step = FedTriNet().loss(table.student, NOTHING, table.batch(targets={"label": given}), weight=0.3)
    total = sum(-math.log(softmax(row)[y]) for row, y in zip(table.weak, given.tolist(), strict=True)) / 8
    assert step.loss.item() == pytest.approx(labeled_mean(table) + 0.3 * total, abs=1e-5)
    gradients = table.gradients(step)
    assert gradients.strong.abs().sum() == 0
    for i, y in enumerate(given.tolist()):
        probs = softmax(table.weak[i])
        expected = [0.3 * (probs[c] - (c == y)) / 8 for c in range(4)]
        assert gradients.weak[i].tolist() == pytest.approx(expected, abs=1e-6)
    (warmup,) = phases(FedTriNet(), 1)
    warm = warmup.loss(table.student, NOTHING, table.batch())
    assert warm.loss.item() == pytest.approx(labeled_mean(table), abs=1e-5)


# Rounds.


WARM_UP = LabelsOnly(phase="warmup")


def train_round(
    method: Method,
    received: StateDict,
    memory: State | None = None,
    data: ClientData | None = None,
    round_number: int = 1,
    config: TrainingConfig = ROUND,
) -> ClientUpdate:
    before = copy.deepcopy((received, memory))
    trainer = Trainer(net(5), net(6), TRANSFORM, config)
    data = client() if data is None else data
    update = train_client(recipe_of(method), trainer, received, data, round_number, SEED, memory)
    assert same(received, before[0])
    assert memory is None or same(memory, before[1])
    return update


def phase_results(monkeypatch: pytest.MonkeyPatch) -> list[PhaseResult]:
    """Everything that phases leave behind from now on."""
    seen: list[PhaseResult] = []
    keep = fedtrinet.keep

    def watching(memory: State, results: Sequence[PhaseResult]) -> State:
        seen.extend(results)
        return keep(memory, results)

    monkeypatch.setattr(fedtrinet, "keep", watching)
    return seen


LATE = FedTriNet(warmup_rounds=0, ramp_end=0, lambda_u=1.0)
"""After the warm-up and the ramp."""


def test_in_the_warm_up_a_client_trains_the_received_features_under_its_own_head() -> None:
    received, own = weights(1), weights(2)
    crossed = {name: own[name] if name in HEAD else received[name] for name in received}
    update = train_round(FedTriNet(), received, old(own))
    assert same(model(update), model(train_round(WARM_UP, crossed)))
    assert differing(model(update), crossed) == HEAD | FEATURES
    assert same(update.kept, old(model(update)))
    assert update.kept["pseudo_label"].tolist() == [-1] * 30
    assert update.pseudo is None
    assert update.parts["model"].weight == 20


def test_one_client_within_the_warm_up_is_supervised_averaging() -> None:
    """Its own head is the global one; to the bit, over three rounds."""
    first, second = weights(1), weights(1)
    memory: State | None = None
    for round_number in (1, 2, 3):
        update = train_round(FedTriNet(), first, memory, round_number=round_number)
        first, memory = model(update), update.kept
        second = model(train_round(WARM_UP, second, round_number=round_number))
        assert same(first, second)
    assert not same(first, weights(1))


def test_n_moves_its_head_only_and_training_starts_from_g(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a threshold that nothing reaches, training is on labels alone, from the received weights."""
    received, own = weights(1), weights(2)
    seen = phase_results(monkeypatch)
    update = train_round(replace(LATE, quality_start=1.0, quality_end=1.0), received, old(own))
    new, trained = seen
    assert (new.name, trained.name) == ("new", "train")
    assert same(new.state, {name: received[name] for name in FEATURES})
    assert differing(new.state, own) == HEAD | FEATURES
    crossed = {name: own[name] if name in HEAD else received[name] for name in received}
    assert differing(new.state, crossed) == HEAD
    assert same(model(update), model(train_round(LabelsOnly(), received)))
    assert same(model(update), trained.state)
    assert same(update.kept, old(trained.state))
    assert update.pseudo is not None
    assert not update.pseudo.keep.any()


def test_ns_head_is_tuned_on_labels_over_frozen_received_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slow way: SGD on the head alone, written out with one full batch of all 10 labels a step."""
    received, own, data = weights(1), weights(2), client()
    seen = phase_results(monkeypatch)
    train_round(replace(LATE, quality_start=1.0), received, old(own), data, config=replace(ROUND, batch_size=10))
    reference = net()
    reference.load_state_dict({name: own[name] if name in HEAD else received[name] for name in received})
    optimizer = torch.optim.SGD(reference[3].parameters(), lr=ROUND.lr)
    for _ in range(5):
        optimizer.zero_grad()
        logits = reference(data.images[:10].float() / 255)
        nn.functional.cross_entropy(logits, data.supervision.candidates[:10].float().argmax(-1)).backward()
        optimizer.step()
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(seen[0].state[name], value, atol=1e-6, rtol=1e-5)


def test_g_o_and_n_label_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The labels are those of the three networks on clean images, N after its tuning, G as received."""
    received, own = ({name: 4 * value for name, value in weights(seed).items()} for seed in (1, 2))  # of some mind
    data = client()
    seen = phase_results(monkeypatch)
    method = replace(LATE, quality_start=0.41, quality_end=0.41)
    update = train_round(method, received, old(own), data)
    images = data.images.float() / 255
    with torch.no_grad():
        states = (received, own, seen[0].state)
        probs = [torch.func.functional_call(net(), state, (images,)).softmax(-1) for state in states]
    largest, label = (probs[0] + probs[1] + probs[2]).max(-1)
    assert all((one.argmax(-1) != label)[10:].any() for one in probs)  # none decides alone
    expected = torch.where(largest >= 3 * 0.41, label, -1)
    assert update.pseudo is not None
    assert update.kept["pseudo_label"].tolist() == expected.tolist()
    assert update.pseudo_index.tolist() == list(range(10, 30))
    assert update.pseudo.keep.tolist() == (expected[10:] >= 0).tolist()
    kept = int(update.pseudo.keep.sum())
    assert 4 <= kept < 20
    assert update.pseudo.label[update.pseudo.keep].tolist() == [y for y in expected[10:].tolist() if y >= 0]
    assert update.sums["pseudo/coverage"] == [kept, 20]
    assert update.sums["train/loss_unsupervised"][1] == 5 * 4
    assert update.parts["model"].weight == 5 * 4 + 5 * (4 + 4)  # N's labelled draws count, too
    assert differing(model(update), received) == HEAD | FEATURES
    assert not same(model(update), model(train_round(LabelsOnly(), received)))


def test_a_label_stays_for_good_and_the_unlabelled_rest_is_not_drawn() -> None:
    """Five samples have labels from an earlier round, all the same one; nothing new reaches the threshold.

    What the other fifteen look like then plays no role, and training is on those five with that label.
    """
    received, own, data = weights(1), weights(2), client()
    known = torch.full((30,), -1)
    known[12:17] = 2
    method = replace(LATE, quality_start=1.0, quality_end=1.0)
    update = train_round(method, received, {**old(own), "pseudo_label": known}, data)
    assert torch.equal(update.kept["pseudo_label"], known)
    assert update.pseudo is not None
    assert update.pseudo.keep.tolist() == (known[10:] >= 0).tolist()
    assert set(update.pseudo.label[update.pseudo.keep].tolist()) == {2}
    others = torch.arange(30) >= 17
    noise = torch.where(others[:, None, None, None], 255 - data.images, data.images)
    changed = train_round(method, received, {**old(own), "pseudo_label": known}, ClientData(noise, data.supervision))
    assert same(model(changed), model(update))
    other_label = torch.where(known >= 0, 1, known)
    relabelled = train_round(method, received, {**old(own), "pseudo_label": other_label}, data)
    assert differing(model(relabelled), model(update)) == HEAD | FEATURES


def test_before_the_ramp_pseudo_labels_are_given_but_move_nothing() -> None:
    received = weights(1)
    method = FedTriNet(warmup_rounds=0, ramp_start=5, ramp_end=9, quality_start=0.0, quality_end=0.0)
    update = train_round(method, received)
    assert update.pseudo is not None
    assert update.pseudo.keep.all()
    expected = model(train_round(LabelsOnly(), received))
    for name, value in expected.items():
        torch.testing.assert_close(model(update)[name], value, atol=1e-7, rtol=1e-6)


def test_labels_at_the_server() -> None:
    """The server moves the model; clients sit out the warm-up, and later if no sample has a label."""
    received, own, data = weights(1), weights(2), client(20, 0)
    trainer = Trainer(net(5), net(6), TRANSFORM, ROUND)
    trained = train_server(recipe_of(LATE), trainer, received, client(10, 10), SEED)
    assert differing(trained, received) == HEAD | FEATURES
    unsure = replace(LATE, quality_start=1.0, quality_end=1.0)
    for method in (FedTriNet(), unsure):
        update = train_round(method, received, {**old(own), "pseudo_label": torch.full((20,), -1)}, data)
        assert update.parts["model"].weight == 0
        assert same(model(update), received)
        assert same(update.kept, old(own))  # what it had stays
    sure = train_round(replace(LATE, quality_start=0.0, quality_end=0.0), received, old(own), data)
    assert differing(model(sure), received) == HEAD | FEATURES
    assert sure.parts["model"].weight == 5 * 4
    assert same(sure.kept, old(model(sure)))


@pytest.mark.parametrize("method", [FedTriNet(), LATE])
def test_what_a_client_keeps_is_like_the_example_that_checkpoints_are_held_against(method: FedTriNet) -> None:
    received, data = weights(1), client()
    memory = memory_of(method)
    example = memory.like(memory.start(data.supervision.candidates), received)
    kept = train_round(method, received, data=data).kept
    assert {n: (v.dtype, v.shape) for n, v in kept.items()} == {n: (v.dtype, v.shape) for n, v in example.items()}


def test_n_is_never_sent() -> None:
    received, trained, new = {"w": torch.tensor(0.0)}, {"w": torch.tensor(1.0)}, {"w": torch.tensor(2.0)}
    results = [PhaseResult("new", new, 20, "crossed"), PhaseResult("train", trained, 20)]
    send, parameters = recipe_of(FedTriNet()).upload.send, frozenset({"w"})
    assert send(received, results, parameters, 40.0) == {"model": ModelPart(trained, 40.0)}
    assert send(received, results[:1], parameters, 20.0) == {"model": ModelPart(received, 0.0)}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("warmup_rounds", -1, r"`method.warmup_rounds` \(=-1\) must be at least 0"),
        ("ramp_start", -1, r"`method.ramp_start` \(=-1\)"),
        ("quality_rounds", -1, r"`method.quality_rounds` \(=-1\)"),
        ("head_layers", 0, r"`method.head_layers` \(=0\) must be at least 1"),
        ("ramp_start", 101, r"`method.ramp_end` \(=100\) must be at least `method.ramp_start` \(=101\)"),
        ("quality_start", 1.5, r"`method.quality_start` \(=1.5\) must lie in \[0, 1\]"),
        ("quality_end", float("nan"), r"`method.quality_end` \(=nan\)"),
        ("lambda_u", -1.0, r"`method.lambda_u` \(=-1.0\) must be a finite number of at least 0"),
        ("lambda_u", float("inf"), r"`method.lambda_u` \(=inf\)"),
    ],
)
def test_wrong_hyper_parameters_are_named(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FedTriNet(**{field: value})
