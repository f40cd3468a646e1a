"""FedMatch against slow derivations per sample and per step, worked numbers, and its limits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fedlabel.learning.client import ClientData, ClientUpdate, Trainer, train_client, train_server
from fedlabel.learning.plan import draw_batches
from fedlabel.learning.training_config import TrainingConfig
from fedlabel.methods.batch import Model, StateDict
from fedlabel.methods.fedmatch import FedMatch, sparse_update, vote
from fedlabel.methods.recipe import Recipe
from fedlabel.methods.uploads import ModelPart, PhaseResult
from fedlabel.models.wrap import one_network
from fedlabel.seeding import torch_generator
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
    train_round,
)

SEEDS = range(5)
SEED = 7
EXACT = {"zero_below": 0.0, "change_above": 0.0}
"""The upload is what was trained, to the bit."""


def recipe_of(method: FedMatch) -> Recipe:
    return method.recipe(task(CLASSES))


class WeakOnly:
    """A helper: logits (u, classes) of the weak views of a `Table` with `labeled` labelled samples; no other images."""

    def __init__(self, logits: Tensor, labeled: int) -> None:
        self.logits = logits.clone().requires_grad_()
        self.first = labeled

    def __call__(self, images: Tensor) -> Tensor:
        rows = images.flatten().long() - self.first
        assert rows.tolist() == list(range(len(self.logits)))
        return self.logits[rows]


def helpers_of(table: Table, *logits: Tensor) -> dict[str, Model]:
    return {f"helper{i}": WeakOnly(given, len(table.labeled)) for i, given in enumerate(logits)}


# The equations.


def test_vote_counts_classes_and_takes_the_smallest_on_a_tie() -> None:
    """Rows: 2 against 1, 1 -> 1; 2, 1, 0 -> 0, though the own model says 2; 2, 2, 0 -> 2; 1, 0 (two voters) -> 0."""
    own, first, second = torch.eye(3)[[2, 2, 2]], torch.eye(3)[[1, 1, 2]], torch.eye(3)[[1, 0, 0]]
    assert vote(own, [first, second]).tolist() == [1, 0, 2]
    assert vote(torch.eye(3)[[1]], [torch.eye(3)[[0]]]).tolist() == [0]
    assert vote(own, []).tolist() == [2, 2, 2]
    # Every model has one vote, however sure it is.
    assert vote(torch.tensor([[0.0, 90.0]]), [torch.tensor([[0.1, 0.0]])] * 2).tolist() == [0]


def test_step_a_by_hand() -> None:
    """p(y) = .5 and .25: lambda_s (ln 2 + ln 4) / 2 = 10 * 1.039721 = 10.397208; the metric is the plain mean."""
    labels = torch.tensor([0, 1])
    table = Table(logits_of([0.5, 0.5], [0.75, 0.25]), labels, torch.zeros(2, 2), torch.zeros(2, 2))
    step = FedMatch().supervised_loss(table.student, NOTHING, table.batch())
    assert step.loss.item() == pytest.approx(10.397208, abs=1e-5)
    assert step.examples.item() == 2
    assert step.metrics["train/loss_supervised"].tolist() == pytest.approx([2.079442, 2])
    assert table.gradients(step).labeled.tolist() == [pytest.approx([-2.5, 2.5]), pytest.approx([3.75, -3.75])]


def test_step_b_by_hand() -> None:
    """One kept sample, p = (.8, .2), helpers (.4, .6) and (.1, .9), strong view (.75, .25); one sample (.6, .4) is not.

    KL(.4,.6 || p) = .4 ln .5 + .6 ln 3 = .381909; KL(.1,.9 || p) = .1 ln .125 + .9 ln 4.5 = 1.145725; mean .763817.
    (The other way, KL(p || p_h): .8 ln 2 + .2 ln(1/3) = .334795 and .8 ln 8 + .2 ln(2/9) = 1.362738, mean .848767.)
    The votes are 0, 1, 1: CE = -ln .25 = 1.386294. With lambda_i = .5 and lambda_a = 2: .381908 + 2.772589 = 3.154497.
    """
    table = Table(
        torch.zeros(1, 2),
        torch.tensor([0]),
        weak=logits_of([0.8, 0.2], [0.6, 0.4]),
        strong=logits_of([0.75, 0.25], [0.5, 0.5]),
    )
    helpers = helpers_of(table, logits_of([0.4, 0.6], [0.5, 0.5]), logits_of([0.1, 0.9], [0.01, 0.99]))
    step = FedMatch(lambda_i=0.5, lambda_a=2.0).unsupervised_loss(table.student, helpers, table.batch())
    assert step.loss.item() == pytest.approx(3.154497, abs=1e-5)
    assert step.examples.item() == 1
    assert step.metrics["train/loss_inter_client"].tolist() == pytest.approx([0.763817, 1])
    assert step.metrics["train/loss_unsupervised"].tolist() == pytest.approx([1.386294, 1])
    assert step.metrics["pseudo/coverage"].tolist() == [1, 2]
    assert step.metrics["pseudo/confidence"].tolist() == pytest.approx([1.4, 2])
    assert step.pseudo is not None
    assert step.pseudo.label[0].item() == 1
    assert step.pseudo.keep.tolist() == [True, False]


@pytest.mark.parametrize("number", [0, 1, 2, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_step_b_per_sample(seed: int, number: int) -> None:
    """d KL(p_h || p) / d logits = p - p_h on the weak view, d CE / d logits = p - onehot on the strong one; helpers
    and labelled samples get nothing. Means over the kept samples and over the helpers there are."""
    tau, lambda_i, lambda_a = 0.8, 0.3, 0.7
    table = random_table(seed)
    others = [random_table(100 * seed + i).weak for i in range(number)]
    helpers = helpers_of(table, *others)
    method = FedMatch(confidence_threshold=tau, lambda_i=lambda_i, lambda_a=lambda_a)
    step = method.unsupervised_loss(table.student, helpers, table.batch())
    gradients = table.gradients(step)
    kept = [i for i, row in enumerate(table.weak) if best(softmax(row))[0] >= tau]
    assert 0 < len(kept) < 8
    total = 0.0
    for i in range(8):
        p, strong = softmax(table.weak[i]), softmax(table.strong[i])
        q = [softmax(other[i]) for other in others]
        classes = [best(probs)[1] for probs in (p, *q)]
        label = min(range(4), key=lambda c: (-classes.count(c), c))
        assert step.pseudo is not None
        assert step.pseudo.label[i].item() == label
        weak_gradient = [0.0] * 4
        strong_gradient = [0.0] * 4
        if i in kept:
            total += -lambda_a * math.log(strong[label])
            strong_gradient = [lambda_a * (strong[c] - (c == label)) / len(kept) for c in range(4)]
            for probs in q:
                total += lambda_i * sum(a * math.log(a / b) for a, b in zip(probs, p, strict=True)) / number
                for c in range(4):
                    weak_gradient[c] += lambda_i * (p[c] - probs[c]) / number / len(kept)
        assert gradients.weak[i].tolist() == pytest.approx(weak_gradient, abs=1e-6)
        assert gradients.strong[i].tolist() == pytest.approx(strong_gradient, abs=1e-6)
    assert step.loss.item() == pytest.approx(total / len(kept), abs=1e-5)
    assert step.examples.item() == len(kept)
    assert gradients.labeled.abs().sum() == 0
    method.unsupervised_loss(table.student, helpers, table.batch()).loss.backward()
    assert all(helper.logits.grad is None for helper in helpers.values())  # type: ignore[attr-defined]


def test_the_threshold_is_of_the_own_weak_view_and_counts_from_itself_on() -> None:
    """(.5, .5) reaches tau = .5; a helper that is sure does not make up for it at tau = .75; tau = 1 needs p = 1."""
    table = Table(torch.zeros(1, 2), torch.tensor([0]), torch.zeros(1, 2), torch.zeros(1, 2))
    sure = helpers_of(table, torch.tensor([[50.0, 0.0]]))
    for tau, kept in ((0.5, 1), (0.75, 0), (1.0, 0)):
        step = FedMatch(confidence_threshold=tau).unsupervised_loss(table.student, sure, table.batch())
        assert step.examples.item() == kept
        assert (step.loss.item() != 0) == bool(kept)
    saturated = Table(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([[200.0, 0.0]]), torch.zeros(1, 2))
    step = FedMatch(confidence_threshold=1.0).unsupervised_loss(saturated.student, NOTHING, saturated.batch())
    assert step.examples.item() == 1


def test_penalty_by_hand() -> None:
    """psi = (1, -2), sigma = (3, .5), lambda_l1 = .1, lambda_l2 = .5: .1 * 3 + .5 * (4 + 6.25) = 5.425.

    By psi: .1 sign(psi) + 2 * .5 (psi - sigma) = (.1 - 2, -.1 - 2.5); the other half, by sigma, is for nobody, since
    step B moves psi only.
    """
    method = FedMatch(lambda_l1=0.1, lambda_l2=0.5)
    parts = {"sigma.a": [3.0], "sigma.b": [[0.5]], "psi.a": [1.0], "psi.b": [[-2.0]]}
    parameters = {name: torch.tensor(value, requires_grad=True) for name, value in parts.items()}
    penalty = method.penalty(parameters)
    penalty.backward()
    assert penalty.item() == pytest.approx(5.425)
    assert parameters["psi.a"].grad is not None
    assert parameters["psi.b"].grad is not None
    assert parameters["psi.a"].grad.item() == pytest.approx(-1.9)
    assert parameters["psi.b"].grad.item() == pytest.approx(-2.6)
    (update_b,) = recipe_of(method).phases(1)[0].then
    assert update_b.penalty is not None
    assert update_b.trains is not None
    assert list(update_b.trains(list(parameters))) == ["psi.a", "psi.b"]


# What is sent.

RECEIVED = {
    "sigma.w": torch.tensor([1.0, 1.0, 1.0, 0.0]),
    "sigma.var": torch.tensor([1.0]),
    "psi.w": torch.tensor([0.5, 0.5, 0.0625, 0.0]),
}
TRAINED = {
    "sigma.w": torch.tensor([1.5, 1.25, 0.03125, 0.03125]),
    "sigma.var": torch.tensor([1.125]),
    "psi.w": torch.tensor([0.03125, 0.25, 0.03125, -0.5]),
}
TRAINED_ONCE = [PhaseResult("train", TRAINED, 5)]


def upload(method: FedMatch, results: list[PhaseResult], weight: float) -> ModelPart:
    (part,) = recipe_of(method).upload.send(RECEIVED, results, frozenset({"sigma.w", "psi.w"}), weight).values()
    return part


def test_upload_by_hand() -> None:
    """Zero below 1/16, sent above a change of 1/4, both exact in binary.

    sigma: .5 of change is sent, .25 is not (no *more* than the limit); 1 -> 1/32 is, and not zeroed; 0 -> 1/32 is not.
    psi: 1/32 becomes 0, a change of .5, sent; .25 of change is not; 1/16 -> 0 is too little; -.5 is sent.
    Buffers go as they are.
    """
    method = FedMatch(zero_below=1 / 16, change_above=1 / 4)
    state = upload(method, TRAINED_ONCE, 37.0).state
    assert state["sigma.w"].tolist() == [1.5, 1.0, 0.03125, 0.0]
    assert state["psi.w"].tolist() == [0.0, 0.5, 0.0625, -0.5]
    assert state["sigma.var"].tolist() == [1.125]
    assert sparse_update(torch.tensor(1.0), torch.tensor(0.5), 0.25).item() == 0.5


@pytest.mark.parametrize("variant", ["full", "disjoint", "inter_client"])
def test_the_mean_is_uniform_over_the_clients_that_trained(variant: str) -> None:
    method = FedMatch(variant=variant)
    for weight, expected in ((37.0, 1.0), (1.0, 1.0), (0.0, 0.0)):
        assert upload(method, TRAINED_ONCE, weight).weight == expected
    assert set(recipe_of(method).upload.send(RECEIVED, [], frozenset(), 0.0)) == {"model"}
    assert same(upload(method, [], 0.0).state, RECEIVED)


def test_claimed_bytes_by_hand() -> None:
    """Four bytes an entry. Up: of the upload above, 2 of sigma, its buffer, 2 of psi = 5 entries = 20 bytes.

    Down: 4 + 1 of sigma and 3 of psi that are not 0; with two helpers three times the latter: 32, 56 bytes.
    Undivided: all 9 entries up, all down, and all of each helper.
    """
    method = FedMatch(zero_below=1 / 16, change_above=1 / 4)
    sent = upload(method, TRAINED_ONCE, 1.0).state
    claimed, whole = (recipe_of(m).upload.claimed_bytes for m in (method, FedMatch(variant="inter_client")))
    assert claimed is not None
    assert claimed(RECEIVED, sent, 0) == (20, 32)
    assert claimed(RECEIVED, sent, 2) == (20, 56)
    assert claimed(RECEIVED, RECEIVED, 0) == (0, 32)
    assert whole is not None
    assert whole(RECEIVED, sent, 0) == (36, 36)
    assert whole(RECEIVED, sent, 2) == (36, 108)


# Rounds.


def made_of(method: FedMatch, seed: int = 1) -> nn.Module:
    """What the method makes of `net(seed)`."""
    return recipe_of(method).network.wrap(lambda place: net(seed), 0)


def start(method: FedMatch) -> StateDict:
    return made_of(method).state_dict()


def fedmatch_round(
    method: FedMatch,
    data: ClientData | None = None,
    config: TrainingConfig = ROUND,
    helpers: Mapping[str, StateDict] | None = None,
) -> ClientUpdate:
    trainer = Trainer(made_of(method, 5), made_of(method, 6), TRANSFORM, config)
    data = client() if data is None else data
    return train_client(recipe_of(method), trainer, start(method), data, 1, SEED, extra_states=helpers or {})


def moved(method: FedMatch, state: StateDict) -> set[str]:
    return {name for name, value in start(method).items() if not torch.equal(value, state[name])}


def names(part: str) -> set[str]:
    return {f"{part}.{name}" for name, _ in net().named_parameters()}


@pytest.mark.parametrize("number", [0, 2])
def test_a_round_is_two_steps_a_batch_written_out(number: int) -> None:
    """The slow way: gradients of the plain network at sigma + psi, sigma moved by A, then psi by B at the new sigma.

    A helper's weights are the sigma of this very moment + its psi.
    """
    lr, tau, lambda_i, lambda_a, l1, l2 = 0.05, 0.45, 0.6, 0.8, 1e-3, 0.2
    method = FedMatch(
        confidence_threshold=tau, lambda_a=lambda_a, lambda_i=lambda_i, lambda_l1=l1, lambda_l2=l2, **EXACT
    )
    data = client()
    states = {f"helper{i}": made_of(method, 20 + i).state_dict() for i in range(number)}
    psis = {helper: {n: v for n, v in state.items() if n.startswith("psi.")} for helper, state in states.items()}
    update = fedmatch_round(method, data, replace(ROUND, lr=lr), psis)

    plain, images = net(), data.images.float() / 255
    sigma = {name: value.detach().clone() for name, value in plain.named_parameters()}
    psi = {name: 0.2 * value for name, value in sigma.items()}

    def logits(rows: Tensor, part: Mapping[str, Tensor], strong: bool = False) -> Tensor:
        weights = {name: sigma[name] + part[name] for name in sigma}
        return torch.func.functional_call(plain, weights, (images[rows].flip(-1) if strong else images[rows],))

    def descend(part: dict[str, Tensor], loss: Tensor) -> None:
        for name, gradient in zip(part, torch.autograd.grad(loss, list(part.values())), strict=True):
            part[name] = part[name].detach() - lr * gradient

    streams = [
        draw_batches(rows, 4, 5, torch_generator(SEED, "train", kind))
        for kind, rows in (("labeled", torch.arange(10)), ("unlabeled", torch.arange(10, 30)))
    ]
    kept, answer = [], data.supervision.candidates.float().argmax(-1)
    for labeled, unlabeled in zip(*streams, strict=True):
        sigma = {name: value.requires_grad_() for name, value in sigma.items()}
        descend(sigma, 10.0 * nn.functional.cross_entropy(logits(labeled, psi), answer[labeled]))
        psi = {name: value.requires_grad_() for name, value in psi.items()}
        log_p, log_strong = (logits(unlabeled, psi, strong).log_softmax(-1) for strong in (False, True))
        with torch.no_grad():
            others = [logits(unlabeled, {n.removeprefix("psi."): v for n, v in p.items()}) for p in psis.values()]
        q = [other.softmax(-1) for other in others]
        keep = [i for i in range(4) if log_p[i].exp().max() >= tau]
        kept.append(len(keep))
        loss = torch.zeros(())
        for i in keep:
            classes = [int(log_p[i].argmax()), *(int(probs[i].argmax()) for probs in q)]
            label = min(range(3), key=lambda c: (-classes.count(c), c))
            loss = loss - lambda_a * log_strong[i, label] / len(keep)
            for probs in q:
                loss = loss + lambda_i * (probs[i] * (probs[i].log() - log_p[i])).sum() / number / len(keep)
        if keep:
            l2_term = sum(((sigma[n] - psi[n]) ** 2).sum() for n in psi)
            descend(psi, loss + l1 * sum(value.abs().sum() for value in psi.values()) + l2 * l2_term)
    assert 0 in kept  # a batch without a step B
    assert sum(kept) > 5
    sent = model(update)
    for name in sigma:
        torch.testing.assert_close(sent[f"sigma.{name}"], sigma[name], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(sent[f"psi.{name}"], psi[name], atol=1e-6, rtol=1e-5)
    assert moved(method, sent) == names("sigma") | names("psi")
    assert (update.sums["train/loss_inter_client"][0] > 0) == (number > 0)
    if number:
        assert not same(sent, model(fedmatch_round(method, data, replace(ROUND, lr=lr))))


def test_labels_move_sigma_only_and_unlabelled_samples_psi_only() -> None:
    method = FedMatch(confidence_threshold=0.0, lambda_l2=0.0, lambda_a=1.0, **EXACT)
    only_labels = fedmatch_round(method, client(10, 10))
    assert moved(method, model(only_labels)) == names("sigma")
    only_unlabeled = fedmatch_round(method, client(20, 0))
    assert moved(method, model(only_unlabeled)) == names("psi")
    assert moved(method, model(fedmatch_round(method))) == names("sigma") | names("psi")
    # Without an unlabelled loss psi gets the gradient 0, and step A does not touch it.
    still = replace(method, lambda_a=0.0, lambda_l1=0.0)
    assert moved(still, model(fedmatch_round(still))) == names("sigma")


def test_without_a_sure_sample_step_b_is_not_taken_not_even_for_the_penalty() -> None:
    """sigma and psi are apart, so the penalty alone would pull psi."""
    method = FedMatch(confidence_threshold=1.0, **EXACT)
    update = fedmatch_round(method)
    assert moved(method, model(update)) == names("sigma")
    assert update.parts["model"].weight == 1
    alone = fedmatch_round(method, client(20, 0))
    assert same(model(alone), start(method))
    assert alone.parts["model"].weight == 0


def test_labels_at_the_server_move_sigma_there_and_psi_at_the_clients() -> None:
    method = FedMatch(confidence_threshold=0.0, lambda_l2=0.01, **EXACT)
    trainer = Trainer(made_of(method, 5), made_of(method, 6), TRANSFORM, ROUND)
    trained = train_server(recipe_of(method), trainer, start(method), client(10, 10), SEED)
    assert moved(method, trained) == names("sigma")
    assert moved(method, model(fedmatch_round(method, client(20, 0)))) == names("psi")
    undivided = FedMatch(variant="inter_client")
    plain = Trainer(net(5), net(6), TRANSFORM, ROUND)
    trained = train_server(recipe_of(undivided), plain, net().state_dict(), client(10, 10), SEED)
    assert not any(torch.equal(trained[name], value) for name, value in net().state_dict().items())


def test_without_psi_and_penalty_it_is_supervised_with_ten_times_the_learning_rate() -> None:
    method = FedMatch(psi_factor=0.0, lambda_a=0.0, lambda_i=0.0, lambda_l1=0.0, lambda_l2=0.0, **EXACT)
    sent = model(fedmatch_round(method, config=replace(ROUND, lr=0.02)))
    expected = model(train_round(LabelsOnly(), config=replace(ROUND, lr=0.2)))
    for name, value in expected.items():
        torch.testing.assert_close(sent[f"sigma.{name}"], value, atol=1e-6, rtol=1e-5)
        assert sent[f"psi.{name}"].abs().sum() == 0


# Variants.


def test_variants() -> None:
    for variant in ("full", "disjoint"):
        parts, plain = start(FedMatch(variant=variant)), net().state_dict()
        assert parts.keys() == {f"{part}.{name}" for part in ("sigma", "psi") for name in plain}
        for name, value in plain.items():
            assert torch.equal(parts[f"sigma.{name}"], value)
            assert torch.equal(parts[f"psi.{name}"], 0.2 * value)
    full, disjoint, undivided = (recipe_of(FedMatch(variant=v)) for v in ("full", "disjoint", "inter_client"))
    assert undivided.network is one_network
    assert disjoint.helpers is None
    assert disjoint.phases(10)[0].teachers == ()
    assert full.helpers is not None
    assert undivided.helpers is not None
    assert (full.helpers.count, full.helpers.every, full.helpers.prefix) == (2, 10, "psi.")
    assert (undivided.helpers.count, undivided.helpers.every, undivided.helpers.prefix) == (2, 10, "")
    assert full.phases(1)[0].teachers == undivided.phases(1)[0].teachers == ("helper0", "helper1")
    assert recipe_of(FedMatch(num_helpers=3)).phases(1)[0].teachers == ("helper0", "helper1", "helper2")


@pytest.mark.parametrize("seed", SEEDS)
def test_the_undivided_model_learns_both_losses_in_one_step(seed: int) -> None:
    table = random_table(seed)
    helpers = helpers_of(table, random_table(50 + seed).weak)
    method = FedMatch(variant="inter_client", confidence_threshold=0.8, lambda_i=0.4, lambda_a=0.9)
    step = method.loss(table.student, helpers, table.batch())
    second = method.unsupervised_loss(table.student, helpers, table.batch())
    assert step.loss.item() == pytest.approx(10 * labeled_mean(table) + second.loss.item(), abs=1e-5)
    assert step.examples == 3 + second.examples
    assert {"train/loss_supervised", "train/loss_unsupervised", "train/loss_inter_client"} <= set(step.metrics)
    (phase,) = recipe_of(method).phases(1)
    assert phase.loss == method.loss
    assert phase.then == ()
    update = train_round(replace(method, confidence_threshold=0.0))
    assert not any(torch.equal(model(update)[name], value) for name, value in net().state_dict().items())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("variant", "both", r"`method.variant` \(=both\) must be one of full, disjoint, inter_client"),
        ("confidence_threshold", 1.5, r"`method.confidence_threshold` \(=1.5\) must lie in \[0, 1\]"),
        ("confidence_threshold", float("nan"), r"`method.confidence_threshold` \(=nan\)"),
        ("lambda_s", -1.0, r"`method.lambda_s` \(=-1.0\) must be a finite number of at least 0"),
        ("lambda_a", float("nan"), r"`method.lambda_a` \(=nan\)"),
        ("lambda_i", float("inf"), r"`method.lambda_i` \(=inf\)"),
        ("lambda_l1", -1e-9, r"`method.lambda_l1` \(=-1e-09\)"),
        ("lambda_l2", -2.0, r"`method.lambda_l2` \(=-2.0\)"),
        ("psi_factor", -0.2, r"`method.psi_factor` \(=-0.2\)"),
        ("zero_below", -1.0, r"`method.zero_below` \(=-1.0\)"),
        ("change_above", float("nan"), r"`method.change_above` \(=nan\)"),
        ("num_helpers", 0, r"`method.num_helpers` \(=0\) must lie in \[1, 100\]"),
        ("helper_interval", 0, r"`method.helper_interval` \(=0\) must be at least 1"),
    ],
)
def test_wrong_hyper_parameters_are_named(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FedMatch(**{field: value})
