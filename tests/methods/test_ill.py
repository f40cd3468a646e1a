"""ILL: worked numbers of each loss, a slow derivation of a mixed batch, limits, and T equal to that of pooled data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fedlabel
from fedlabel.data.labels.supervision import Supervision
from fedlabel.inference.imprecise import (
    SetLikelihood,
    candidates_log_likelihood,
    label_log_likelihood,
    marginal_nll,
    posterior,
)
from fedlabel.inference.transition import diagonal_transition, expected_counts, from_counts
from fedlabel.learning.client import ClientData
from fedlabel.methods.batch import Batch, Part, State, Step
from fedlabel.methods.federated_transition import NoiseMatrix
from fedlabel.methods.ill import ILL, _log_one_minus, aligned, balance, complement
from fedlabel.methods.recipe import Recipe
from fedlabel.methods.shared import Limits
from tests.methods.recipes import task
from tests.methods.tables import CLASSES, NOTHING, client, logits_of, net, softmax, train_round

T = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.1, 0.3, 0.6]])
WEAK, STRONG, SECOND = [0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [0.6, 0.2, 0.2]


class Views:
    """Logits of labelled samples (weak, strong, second strong view) and of unlabelled ones (weak, strong)."""

    def __init__(self, labeled: Sequence[Tensor], unlabeled: Sequence[Tensor]) -> None:
        tables = [*labeled, *unlabeled]
        self.sizes = [len(table) for table in tables]
        self.rows = torch.cat(tables).clone().requires_grad_()

    def student(self, images: Tensor) -> Tensor:
        return self.rows[images.flatten().long()]

    def batch(self, known: Supervision, memory: State) -> Batch:
        ends = torch.tensor(self.sizes).cumsum(0).tolist()
        rows = [torch.arange(e - n, e).float().view(n, 1, 1, 1) for e, n in zip(ends, self.sizes, strict=True)]
        count = self.sizes[-1]
        nothing = Supervision.certain(torch.ones(count, self.rows.shape[1], dtype=torch.bool))
        return Batch(
            labeled=part(dict(zip(("weak", "strong", "strong2"), rows[:-2], strict=False)), known),
            unlabeled=part({"weak": rows[-2], "strong": rows[-1]}, nothing),
            mix=part({}, nothing.rows(torch.arange(0))),
            mixing=torch.tensor(1.0),
            memory=memory,
        )

    def gradients(self, step: Step) -> Sequence[Tensor]:
        (gradient,) = torch.autograd.grad(step.loss, self.rows)
        return gradient.split(self.sizes)


def part(views: dict[str, Tensor], known: Supervision) -> Part:
    n = len(known.noisy)
    size = torch.tensor(float(n))
    return Part(views, known.candidates, {}, known.noisy, known.annotations, torch.arange(n), size)


def record(*rows: str, noisy: Sequence[bool] = (), annotations: Sequence[Sequence[int]] = ()) -> Supervision:
    """record("110") has the candidates {0, 1}."""
    candidates = torch.tensor([[digit == "1" for digit in row] for row in rows])
    flags = torch.tensor(list(noisy) or [False] * len(rows))
    given = torch.tensor(annotations) if annotations else torch.zeros(len(rows), 0, dtype=torch.int64)
    return Supervision.without_bags(candidates, flags, given)


def recipe_of(method: ILL, num_classes: int = CLASSES) -> Recipe:
    return method.recipe(task(num_classes))


def first_memory(method: ILL, num_classes: int = CLASSES) -> State:
    """The memory of a client that never trained, in round 1."""
    recipe = recipe_of(method, num_classes)
    return {**recipe.memory.start(torch.ones(1, num_classes, dtype=torch.bool)), **recipe.shared.start()}


def memory_of(method: ILL, transition: Tensor = T) -> State:
    memory = first_memory(method, len(transition))
    return {name: transition[None] if name.endswith("transition") else value for name, value in memory.items()}


def evaluate(method: ILL, known: Supervision, *labeled: list[float], unlabeled: Sequence[Any] = ()) -> Step:
    """The step of one labelled sample whose views have these probabilities, and of unlabelled (weak, strong) pairs."""
    weak, strong = ([pair[i] for pair in unlabeled] for i in (0, 1))
    none = torch.zeros(0, len(labeled[0]))
    views = Views(
        [logits_of(row) for row in labeled], [logits_of(*weak) if weak else none, logits_of(*strong) if weak else none]
    )
    return method.loss(views.student, NOTHING, views.batch(known, memory_of(method)))


# ------------------------------------------------------------------------------------------------------- worked numbers


def test_candidate_set_by_hand() -> None:
    """q = (.625, .375, 0); strong (.4, .4, .2): CE = -ln .4 = .9162907."""
    assert evaluate(ILL(), record("110"), WEAK, STRONG).loss.item() == pytest.approx(0.9162907, abs=1e-6)


def test_released_variants_of_a_candidate_set_by_hand() -> None:
    """CE on the three views .8847068, .9162907, .9228052, mean .9079343; complement -ln(1 - .2) = .2231436; balance
    -(ln .5 + ln .3 + ln .2) / 3 = 1.168853, a tenth of it .1168853; in all 1.2479631."""
    method = ILL(view_mean=True, complement_weight=1.0, balance_weight=0.1)
    step = evaluate(method, record("110"), WEAK, STRONG, SECOND)
    assert step.loss.item() == pytest.approx(1.2479631, abs=1e-5)
    alone = evaluate(ILL(view_mean=True), record("110"), WEAK, STRONG, SECOND)
    assert alone.loss.item() == pytest.approx(0.9079343, abs=1e-6)


def test_noisy_label_by_hand() -> None:
    """q = (.15625, .65625, .1875); CE with strong (.4, .4, .2) 1.0462558; forward -ln .32 = 1.1394343.

    Re-weighted, p T[:, 1] = (.04, .28, .06) / .38 = (.105263, .736842, .157895): .8982636.
    """
    known = record("010", noisy=[True])
    assert evaluate(ILL(), known, WEAK, STRONG).loss.item() == pytest.approx(1.0462558 + 1.1394343, abs=1e-6)
    em = evaluate(ILL(forward_weight=0.0), known, WEAK, STRONG)
    assert em.loss.item() == pytest.approx(1.0462558, abs=1e-6)
    weighted = evaluate(ILL(forward_weight=0.0, reweighted=True), known, WEAK, STRONG)
    assert weighted.loss.item() == pytest.approx(0.8982636, abs=1e-6)


def test_complement_by_hand() -> None:
    """p = (.4, .3, .2, .1), S = {0}: -(ln .7 + ln .8 + ln .9) = .6851790 <= -ln .4 = .9162907; equal only where one
    class is outside, S = {0, 1, 2}: -ln .9."""
    logits = logits_of([0.4, 0.3, 0.2, 0.1])
    one = complement(logits, torch.tensor([[True, False, False, False]]))
    assert one.item() == pytest.approx(0.6851790, abs=1e-5)
    likelihood = marginal_nll(logits, candidates_log_likelihood(torch.tensor([[True, False, False, False]])))
    assert likelihood.item() == pytest.approx(0.9162907, abs=1e-6)
    three = complement(logits, torch.tensor([[True, True, True, False]]))
    assert three.item() == pytest.approx(-math.log(0.9), abs=1e-5)


def test_complement_is_at_most_the_likelihood_and_equal_with_one_class_outside() -> None:
    logits = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    for size in range(1, 5):
        sets = torch.arange(5).expand(64, 5) < size
        difference = marginal_nll(logits, candidates_log_likelihood(sets)) - complement(logits, sets)
        if size == 4:
            assert difference.abs().max() < 1e-5
        else:
            assert difference.min() > 1e-4


def test_complement_of_a_collapsed_matrix_is_finite_with_its_gradient() -> None:
    """All labels are class 0: sums of rounded probabilities may exceed 1."""
    logits = torch.randn(2000, 10, generator=torch.Generator().manual_seed(0)).requires_grad_()
    collapsed = torch.eye(10)[:1].expand(10, 10)
    value = _log_one_minus(logits.softmax(-1) @ collapsed, torch.arange(10).expand(2000, 10) == 0)
    value.sum().backward()
    assert value.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_cut_target_keeps_as_many_classes_as_asked_for() -> None:
    """Ties too; and a class that is never predicted on average divides by nothing."""
    assert (aligned(torch.full((2, 10), 0.1), None, 3) > 0).sum(1).tolist() == [3, 3]
    assert aligned(torch.tensor([[1.0, 0.0]]), torch.tensor([1.0, 0.0]), None).tolist() == [[1, 0]]


def test_complement_of_a_noisy_set_looks_at_the_noisy_label() -> None:
    """Said of S = {0, 2} that may miss the truth: p T = (.48, .32, .2), so -ln(1 - .32) = .3856625."""
    step = evaluate(ILL(complement_weight=1.0), record("101", noisy=[True]), WEAK, STRONG)
    plain = evaluate(ILL(), record("101", noisy=[True]), WEAK, STRONG)
    assert (step.loss - plain.loss).item() == pytest.approx(0.3856625, abs=1e-5)


def test_balance_is_least_where_predictions_are_even() -> None:
    """Two samples (.9, .1) and (.1, .9): mean (.5, .5), ln 2."""
    assert balance(logits_of([0.9, 0.1], [0.1, 0.9])).item() == pytest.approx(math.log(2))
    assert balance(logits_of([0.9, 0.1])).item() > math.log(2)
    assert balance(torch.zeros(0, 2)).item() == 0


def test_alignment_and_top_three_by_hand() -> None:
    """p / mean = (1.25, 1.5, .5, .6, .4) / 4.25; the three largest of them / 3.35."""
    p = torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.04]])
    mean = torch.tensor([0.4, 0.2, 0.2, 0.1, 0.1])
    even = torch.tensor([[0.294118, 0.352941, 0.117647, 0.141176, 0.094118]])
    torch.testing.assert_close(aligned(p, mean, None), even, atol=1e-6, rtol=0)
    cut = torch.tensor([[0.373134, 0.447761, 0.0, 0.179104, 0.0]])
    torch.testing.assert_close(aligned(p, mean, 3), cut, atol=1e-6, rtol=0)
    torch.testing.assert_close(aligned(p, None, 9), p)


def test_moving_average_of_alignment() -> None:
    """From (1/2, 1/2) with .75 by a batch of mean (.9, .1): (.6, .4); then q ~ (.9 / .6, .1 / .4) = (6/7, 1/7)."""
    method = ILL(alignment=True, alignment_ema=0.75)
    views = Views([torch.zeros(0, 2)] * 2, [logits_of([0.9, 0.1]), logits_of([0.5, 0.5])])
    none = Supervision.certain(torch.ones(0, 2, dtype=torch.bool))
    memory = first_memory(method, 2)
    step = method.loss(views.student, NOTHING, views.batch(none, memory))
    assert step.memory is not None
    assert step.memory["class_mean"].tolist() == pytest.approx([0.6, 0.4])
    assert step.pseudo is not None
    assert step.pseudo.confidence.item() == pytest.approx(6 / 7)
    shared = recipe_of(method, 2).shared
    total = {name: value * 2 for name, value in shared.statistics(step.memory).items()}
    assert shared.update(shared.start(), total)["class_mean"].tolist() == pytest.approx([0.6, 0.4])


def test_averages_of_alignment_are_of_one_client_and_shared_with_the_matrix() -> None:
    shared = recipe_of(ILL(alignment=True)).shared
    start, mean = shared.start(), torch.tensor([0.2, 0.3, 0.5])
    assert shared.broadcast(start).keys() == {"class_mean", "transition"}
    limits = Limits(samples=10, annotators=0, steps=2, examples=8)
    good = {"class_mean": mean, "aligned": torch.tensor(1.0), "counts": torch.eye(3)[None]}
    shared.check_statistics(good, start, limits)
    for wrong, message in (
        ({"class_mean": 2 * mean}, "class_mean must be probabilities"),
        ({"class_mean": 2 * mean, "aligned": torch.tensor(2.0)}, "aligned must hold only 0 and 1"),
        ({"counts": 4 * torch.eye(3)[None]}, "counts counts 12 samples, and it can have 10"),
    ):
        with pytest.raises(ValueError, match=message):
            shared.check_statistics({**good, **wrong}, start, limits)
    for name in ("class_mean", "transition"):
        with pytest.raises(ValueError, match=f"{name} must be probabilities"):
            shared.check({**start, name: 2 * start[name]})


def test_annotators_by_hand() -> None:
    """Labels 1 and 2: weights (.5 * .1 * .1, .3 * .7 * .1, .2 * .3 * .6) = (5, 21, 36) / 1000; forward -ln .062."""
    known = record("111", annotations=[[1, 2]])
    step = evaluate(ILL(), known, WEAK, STRONG)
    q = [5 / 62, 21 / 62, 36 / 62]
    expected = -sum(a * math.log(b) for a, b in zip(q, STRONG, strict=True)) - math.log(0.062)
    assert step.loss.item() == pytest.approx(expected, abs=1e-6)


# ------------------------------------------------------------------------------------------------- a batch of all kinds

MIXED = record(
    "001", "110", "010", "101", "111", "011",
    noisy=[False, False, True, True, False, False],
    annotations=[[-1], [-1], [-1], [-1], [2], [1]],
)  # fmt: skip
"""A label, a set, a noisy label, a noisy set, an annotator, a set with an annotator."""


def likelihoods() -> list[list[float]]:
    """p(all that is known | y) of MIXED, from T entry by entry."""
    t = T.tolist()
    return [
        [0, 0, 1],
        [1, 1, 0],
        [t[y][1] for y in range(3)],
        [t[y][0] * t[y][2] for y in range(3)],
        [t[y][2] for y in range(3)],
        [0, t[1][1], t[2][1]],
    ]


@pytest.mark.parametrize("seed", range(5))
def test_mixed_batch_per_sample(seed: int) -> None:
    """Every kind of sample in one batch, two unlabelled ones beside; gradients of each view written out:
    (p_strong - q) / n for all but the label, and on the weak view p - q of the label and of what is noisy."""
    generator = torch.Generator().manual_seed(seed)
    tables = [2 * torch.randn(n, 3, generator=generator) for n in (6, 6, 2, 2)]
    method = ILL(lambda_u=1.5, forward_weight=0.7, set_likelihood=SetLikelihood("product"))
    views = Views(tables[:2], tables[2:])
    step = method.loss(views.student, NOTHING, views.batch(MIXED, memory_of(method)))
    weak, strong, weak_u, strong_u = views.gradients(step)
    total = 0.0
    for i, row in enumerate(likelihoods()):
        p, p_strong = softmax(tables[0][i]), softmax(tables[1][i])
        joint = [a * b for a, b in zip(p, row, strict=True)]
        q = [value / sum(joint) for value in joint]
        em = 0.0 if i == 0 else -sum(a * math.log(b) for a, b in zip(q, p_strong, strict=True))
        on_weak = {0: 1.0, 1: 0.0}.get(i, 0.7)
        total += (em - on_weak * math.log(sum(joint))) / 6
        expected = [0.0] * 3 if i == 0 else [(b - a) / 6 for a, b in zip(q, p_strong, strict=True)]
        assert strong[i].tolist() == pytest.approx(expected, abs=1e-6)
        assert weak[i].tolist() == pytest.approx([on_weak * (b - a) / 6 for a, b in zip(q, p, strict=True)], abs=1e-6)
    for i in range(2):
        q, p = softmax(tables[2][i]), softmax(tables[3][i])
        total -= 0.5 * sum(a * math.log(b) for a, b in zip(q, p, strict=True)) / 2  # 1.5 * 2 unknown / 6 known
        assert strong_u[i].tolist() == pytest.approx([0.5 * (b - a) / 2 for a, b in zip(q, p, strict=True)], abs=1e-6)
    assert weak_u.abs().sum() == 0
    assert step.loss.item() == pytest.approx(total, abs=1e-5)
    assert step.examples.item() == 8


def test_same_view_of_an_unlabelled_sample_gives_no_gradient() -> None:
    """q from the same view and no alignment: p - q = 0. With the cut to one class there is a gradient."""
    logits = torch.tensor([[1.0, 0.2, -0.5]])
    none = record("111").rows(torch.arange(0))
    sizes = []
    for method in (ILL(), ILL(top_k=1)):
        views = Views([torch.zeros(0, 3)] * 2, [logits, logits])
        gradients = views.gradients(method.loss(views.student, NOTHING, views.batch(none, memory_of(method))))
        sizes.append(gradients[-1].abs().sum().item())
    assert sizes[0] == pytest.approx(0, abs=1e-6)
    assert sizes[1] > 0.1


# ------------------------------------------------------------------------------------------- the federated noise matrix


def noisy_client(seed: int, n: int = 40, annotators: int = 0) -> ClientData:
    generator = torch.Generator().manual_seed(seed)
    images = client(n).images
    labels = torch.randint(CLASSES, (n,), generator=generator)
    candidates = labels[:, None] == torch.arange(CLASSES)
    noisy = torch.ones(n, dtype=torch.bool)
    given = torch.zeros(n, 0, dtype=torch.int64)
    if annotators:
        candidates, noisy = torch.ones_like(candidates), torch.zeros_like(noisy)
        given = torch.randint(-1, CLASSES, (n, annotators), generator=generator)
    return ClientData(images, Supervision.without_bags(candidates, noisy, given))


def summed(method: ILL, clients: Sequence[ClientData], shared: State) -> State:
    """The statistics of a round in which all clients start from `net()`."""
    all_of_them = [train_round(method, data, shared=shared).statistics for data in clients]
    return {name: sum((s[name] for s in all_of_them), torch.zeros(())) for name in all_of_them[0]}


def central_step(clients: Sequence[ClientData], transition: Tensor, smoothing: float) -> Tensor:
    """One EM step of T on the union of all clients' data, in double precision, straight from the definition."""
    images = torch.cat([data.images for data in clients]).float() / 255
    with torch.no_grad():
        probs = net()(images).double().softmax(1)
    labels = torch.cat([data.supervision.label for data in clients])
    counts = torch.zeros(CLASSES, CLASSES).double()
    for p, label in zip(probs, labels.tolist(), strict=True):
        joint = p * transition[:, label].double()
        counts[:, label] += joint / joint.sum()
    total = counts + smoothing * transition
    return total / total.sum(1, keepdim=True)


@pytest.mark.parametrize("smoothing", [0.0, 1.0], ids=["EM", "with the T before as prior"])
def test_closed_form_is_that_of_the_union_of_all_clients(smoothing: float) -> None:
    method = ILL(noise=NoiseMatrix(warmup_rounds=0, decay=0.0, smoothing=smoothing))
    clients = [noisy_client(seed, n) for seed, n in ((1, 40), (2, 7), (3, 80))]
    closed_form = recipe_of(method).shared
    shared = closed_form.start()
    for _ in range(3):
        expected = central_step(clients, shared["transition"][0], smoothing)
        shared = closed_form.update(shared, summed(method, clients, shared))
        torch.testing.assert_close(shared["transition"][0].double(), expected, atol=1e-6, rtol=0)
    assert (shared["transition"][0] - diagonal_transition(CLASSES, 0.3)).abs().max() > 0.02


def test_annotators_have_matrices_of_their_own() -> None:
    """Each matrix is what EM gives with the posterior of both annotators' labels."""
    method = ILL(noise=NoiseMatrix(warmup_rounds=0, annotators=2, smoothing=0.5))
    data = noisy_client(4, annotators=2)
    closed_form = recipe_of(method).shared
    shared = closed_form.start()
    found = closed_form.update(shared, summed(method, [data], shared))["transition"]
    with torch.no_grad():
        logits = net()(data.images.float() / 255)
    labels, start = data.supervision.annotations, diagonal_transition(CLASSES, 0.3)
    q = posterior(logits, label_log_likelihood(labels[:, 0], start) + label_log_likelihood(labels[:, 1], start))
    for annotator in range(2):
        expected = from_counts(expected_counts(q, labels[:, annotator]), 0.5 * start)
        torch.testing.assert_close(found[annotator], expected, atol=1e-6, rtol=0)


def test_warm_up_and_decay() -> None:
    """Clients of rounds 1 and 2 have the start; then the counts are those of the round plus half of what was there,
    without the first round's, and a class without counts keeps its row."""
    closed_form = NoiseMatrix(warmup_rounds=2, decay=0.5, smoothing=2.0).shared(CLASSES, 1, None)
    start = closed_form.start()
    counts = torch.tensor([[[5.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 2.0, 3.0]]])
    shared = closed_form.update(start, {"counts": 7 * counts})
    assert torch.equal(shared["transition"], start["transition"])
    shared = closed_form.update(shared, {"counts": counts})
    second = from_counts(counts, 2 * start["transition"])
    torch.testing.assert_close(shared["transition"], second)
    shared = closed_form.update(shared, {"counts": counts})
    torch.testing.assert_close(shared["transition"], from_counts(1.5 * counts, 2 * second))
    torch.testing.assert_close(shared["transition"][0, 1], start["transition"][0, 1])
    nobody = closed_form.update(shared, {"counts": 0 * counts})
    assert (nobody["transition"] - shared["transition"]).abs().max() < 0.1


def test_own_matrix_of_a_client() -> None:
    """scope=client: from its own counts and the start, kept, and nothing is sent; prior: drawn to the global one."""
    data, start = noisy_client(1), diagonal_transition(CLASSES, 0.3)
    with torch.no_grad():
        q = posterior(net()(data.images.float() / 255), label_log_likelihood(data.supervision.label, start))
    counts = expected_counts(q, data.supervision.label)
    own = ILL(noise=NoiseMatrix(scope="client", warmup_rounds=0, smoothing=2.0))
    update = train_round(own, data)
    assert update.statistics == {}
    torch.testing.assert_close(update.kept["own_transition"][0], from_counts(counts, 2 * start))
    with torch.no_grad():  # a client that comes late starts from the global matrix
        q = posterior(net()(data.images.float() / 255), label_log_likelihood(data.supervision.label, T))
    counts = expected_counts(q, data.supervision.label)
    drawn = ILL(noise=NoiseMatrix(scope="prior", warmup_rounds=0, strength=5.0))
    shared = {**recipe_of(drawn).shared.start(), "transition": T[None]}
    update = train_round(drawn, data, shared=shared)
    torch.testing.assert_close(update.statistics["counts"][0], counts)
    torch.testing.assert_close(update.kept["own_transition"][0], from_counts(counts, 5 * T))
    recipe = recipe_of(own)
    assert recipe.inspect(recipe.shared.start()) == {}


def test_gradient_form_moves_the_logits_and_the_server_takes_their_mean() -> None:
    method = ILL(noise=NoiseMatrix(form="gradient", warmup_rounds=0, lr=0.5))
    recipe = recipe_of(method)
    shared = recipe.shared.start()
    updates = [train_round(method, data, shared=shared) for data in (noisy_client(1), noisy_client(2, n=8))]
    weights = [float(update.statistics["noisy_samples"]) for update in updates]
    assert weights[0] == 20  # 5 steps of 4
    logits = [update.statistics["logits"] / weight for update, weight in zip(updates, weights, strict=True)]
    assert all((value - shared["logits"]).abs().max() > 0.01 for value in logits)
    total = {name: sum((u.statistics[name] for u in updates), torch.zeros(())) for name in updates[0].statistics}
    moved = recipe.shared.update(shared, total)
    torch.testing.assert_close(moved["logits"], (logits[0] * weights[0] + logits[1] * weights[1]) / sum(weights))
    torch.testing.assert_close(recipe.inspect(moved)["noise_matrix"], moved["logits"].softmax(-1))
    frozen = ILL(noise=NoiseMatrix(form="gradient", warmup_rounds=1))
    assert torch.equal(
        train_round(frozen, noisy_client(1), shared=shared).statistics["noisy_samples"], torch.tensor(0.0)
    )


def test_fixed_matrix_stays() -> None:
    method = ILL(noise=NoiseMatrix(form="fixed"))
    update = train_round(method, noisy_client(1))
    assert update.statistics == {}
    recipe = recipe_of(method)
    shared = recipe.shared.start()
    assert torch.equal(recipe.shared.update(shared, {})["transition"], shared["transition"])
    torch.testing.assert_close(recipe.inspect(shared)["noise_matrix"], diagonal_transition(CLASSES, 0.3)[None])


def test_nobody_with_noisy_labels_leaves_the_start() -> None:
    method = ILL(noise=NoiseMatrix(warmup_rounds=0))
    closed_form = recipe_of(method).shared
    shared = closed_form.start()
    after = closed_form.update(shared, summed(method, [client()], shared))
    torch.testing.assert_close(after["transition"], shared["transition"])


# -------------------------------------------------------------------------------------------------------------- limits


def test_a_few_unknown_samples_weigh_no_more_than_known_ones() -> None:
    """Of a client's 40 samples one is unknown: its loss weighs 1/39 of the mean over the others; of 80, once."""
    views = Views([logits_of(WEAK), logits_of(STRONG)], [logits_of(WEAK), logits_of(STRONG)])
    batch = views.batch(record("110"), memory_of(ILL()))
    alone = -sum(a * math.log(b) for a, b in zip(WEAK, STRONG, strict=True))
    for known, unknown, weight in ((39, 1, 1 / 39), (39, 41, 1.0), (0, 5, 1.0)):
        sized = batch._replace(
            labeled=batch.labeled._replace(size=torch.tensor(float(known))),
            unlabeled=batch.unlabeled._replace(size=torch.tensor(float(unknown))),
        )
        step = ILL().loss(views.student, NOTHING, sized)
        assert step.loss.item() == pytest.approx(0.9162907 + weight * alone, abs=1e-6)


def test_certain_label_on_the_strong_view() -> None:
    """As a set of one class: -ln .4 on the strong view, in place of -ln .3 on the weak one; complement -ln(.5 * .8)."""
    strong = evaluate(ILL(label_view="strong"), record("010"), WEAK, STRONG)
    assert strong.loss.item() == pytest.approx(-math.log(0.4))
    both = evaluate(ILL(label_view="strong", complement_weight=1.0), record("010"), WEAK, STRONG)
    assert both.loss.item() == pytest.approx(-math.log(0.4) - math.log(0.5 * 0.8), abs=1e-5)
    weak = evaluate(ILL(complement_weight=1.0), record("010"), WEAK, STRONG)
    assert weak.loss.item() == pytest.approx(-math.log(0.3))


def test_full_label_overrides_what_annotators_say() -> None:
    plain = evaluate(ILL(), record("010"), WEAK, STRONG)
    both = evaluate(ILL(), record("010", annotations=[[2]]), WEAK, STRONG)
    assert both.loss.item() == pytest.approx(plain.loss.item()) == pytest.approx(-math.log(0.3))


def test_set_of_all_and_nothing_known_are_one_loss() -> None:
    """A noisy set of all classes says nothing: CE(p, strong), and the forward term is -ln 1 = 0."""
    step = evaluate(ILL(), record("111", noisy=[True]), WEAK, STRONG)
    expected = -sum(a * math.log(b) for a, b in zip(WEAK, STRONG, strict=True))
    assert step.loss.item() == pytest.approx(expected, abs=1e-6)


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(ILL, lambda_u=-1), r"`method.lambda_u` \(=-1\) must be a finite number of at least 0"),
        (partial(ILL, top_k=0), r"`method.top_k` \(=0\) must be at least 1"),
        (partial(ILL, alignment_ema=1.0), r"`method.alignment_ema` \(=1.0\) must lie in \[0, 1\)"),
        (partial(NoiseMatrix, form="em"), r"`method.noise.form` \(=em\) must be one of closed, gradient, fixed, known"),
        (partial(NoiseMatrix, scope="x"), r"`method.noise.scope` \(=x\) must be one of global, client, prior"),
        (partial(NoiseMatrix, form="gradient", scope="prior"), r"scope` \(=prior\) adds up counts.*form=closed"),
        (partial(NoiseMatrix, start=1.0), r"`method.noise.start` \(=1.0\) must lie in \(0, 1\)"),
        (partial(NoiseMatrix, decay=1.0), r"`method.noise.decay` \(=1.0\) must lie in \[0, 1\)"),
        (partial(NoiseMatrix, annotators=0), r"`method.noise.annotators` \(=0\) must lie in \[1, 1000\]"),
        (partial(NoiseMatrix, lr=0), r"`method.noise.lr` \(=0\) must be a positive number"),
        (partial(NoiseMatrix, warmup_rounds=-1), r"warmup_rounds` \(=-1\) must be at least 0"),
        (partial(NoiseMatrix, smoothing=-1), r"`method.noise.smoothing` \(=-1\) must be a finite number of at least 0"),
        (
            partial(ILL(noise=NoiseMatrix(start=0.6)).recipe, task(2)),
            r"`method.noise.start` \(=0.6\) must be below 0.5 for 2 classes",
        ),
        (partial(ILL, label_view="clean"), r"`method.label_view` \(=clean\) must be one of weak, strong"),
    ],
)
def test_errors(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_known_matrix_is_that_of_the_randomised_response_and_stays() -> None:
    """Epsilon ln 6 of 3 classes: 6 / 8 on the diagonal, 1 / 8 beside it. No statistic of it leaves a client."""
    method = ILL(noise=NoiseMatrix(form="known"))
    recipe = method.recipe(task(label_epsilon=math.log(6)))
    shared = recipe.shared.start()
    expected = torch.full((3, 3), 1 / 8) + torch.eye(3) * 5 / 8
    torch.testing.assert_close(recipe.inspect(shared)["noise_matrix"], expected[None])
    assert recipe.shared.statistics({**recipe.memory.start(torch.ones(1, 3, dtype=torch.bool)), **shared}) == {}
    assert recipe.shared.update(shared, {}) is shared
    with pytest.raises(ValueError, match=r"`method.noise.form` \(=known\) needs noisy labels that all come from one"):
        method.recipe(task())


def test_known_matrix_beats_cross_entropy_on_randomised_responses(tmp_path: Path) -> None:
    """Epsilon 1.5 leaves 33 % of the labels of digits right, the other classes have 7 % each. After 80 passes over
    them, ILL with the known T has .897, .861 (seeds 0, 1), cross-entropy .656, .683."""
    quick = ("evaluation.figures=false", "evaluation.every=8", "device=cpu")
    plain = (
        *("method.name=supervised", "num_clients=5", "fraction_train=1.0", "num_rounds=8", "partition.kind=iid"),
        *("supervision.kind=noisy", "supervision.noise=randomized_response", "supervision.label_epsilon=1.5"),
        *("training.local_epochs=10", "training.batch_size=32", "training.momentum=0.9", "training.weight_by=size"),
        *("model.name=mlp", "evaluation.panel_samples=0", "data.name=digits"),
    )
    runs = {"known": ("experiment/randomized_response_digits.yaml", ()), "plain": ((), plain)}
    found = {
        name: fedlabel.run(file, overrides=[*keys, *quick], name=name, out=tmp_path).summary["eval/accuracy"]["last"]
        for name, (file, keys) in runs.items()
    }
    assert found["known"] > 0.8
    assert found["known"] > found["plain"] + 0.1


def test_wrong_number_of_annotators_is_named() -> None:
    for annotators in (1, 2):
        ILL(noise=NoiseMatrix(annotators=annotators)).recipe(task(annotators=2))
    with pytest.raises(ValueError, match=r"`method.noise.annotators` \(=3\) must be 1, .* 2"):
        ILL(noise=NoiseMatrix(annotators=3)).recipe(task(annotators=2))


def test_generator_likelihood_reaches_the_loss() -> None:
    """S = {0, 2} with noise .2 and r = .1: q = (.588235, .176471, .235294); forward with p(S) = .0612."""
    method = ILL(set_likelihood=SetLikelihood("generator", 0.1, 0.2))
    step = evaluate(method, record("101", noisy=[True]), WEAK, STRONG)
    q = [0.588235, 0.176471, 0.235294]
    expected = -sum(a * math.log(b) for a, b in zip(q, STRONG, strict=True)) - math.log(0.0612)
    assert step.loss.item() == pytest.approx(expected, abs=1e-5)
