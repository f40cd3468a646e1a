"""The baselines for bags of known counts: losses by hand, gradients, limits, worked numbers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedlabel.config import load_config
from fedlabel.data.labels.supervision import Supervision
from fedlabel.experiment import Experiment
from fedlabel.inference.cardinality import bag_posterior
from fedlabel.learning.plan import bag_units
from fedlabel.methods.bags import bag_means, by_bag
from fedlabel.methods.batch import Batch, State, Survey
from fedlabel.methods.count_likelihood import CountLikelihood, one_against_rest
from fedlabel.methods.dllp import DLLP, dllp_loss
from fedlabel.methods.easy_llp import EasyLLP, easy_weights, even_prior, with_prior
from fedlabel.methods.gen_bags import GenBags, expected_square
from fedlabel.methods.llp_vat import LLPVAT, divergence, unit
from fedlabel.methods.recipe import ByBag, LabelKinds, Method, Phase
from fedlabel.methods.top_count import TopCount, top_counts
from tests.methods.batches import make_part
from tests.methods.recipes import task

MEMBERS = torch.tensor([[0, 1, 2, 3], [4, 5, -1, -1], [6, -1, -1, -1], [7, -1, -1, -1]])
"""Bags of four and two samples, a labelled sample, and one without any label."""
COUNTS = torch.tensor([[3, 1], [1, 1], [0, 1], [0, 0]])
P = torch.tensor([0.9, 0.6, 0.2, 0.1, 0.7, 0.4, 0.8, 0.5], dtype=torch.float64)


def two(p: Tensor) -> Tensor:
    """Logits of two classes with p(1) = p."""
    return torch.stack([(1 - p).log(), p.log()], 1)


def make_batch(memory: State | None = None, members: Tensor = MEMBERS, counts: Tensor = COUNTS) -> Batch:
    part = make_part(int(members.max()) + 1, counts.shape[1])._replace(members=members, bag_counts=counts)
    nothing = make_part(0, counts.shape[1])
    return Batch(part, nothing, nothing, torch.tensor(1.0), memory or {})


def phase_of(method: Method, num_classes: int = 2) -> Phase:
    """Returns the one phase of all rounds."""
    recipe = method.recipe(task(num_classes))
    ((phase,),) = {recipe.phases(r) for r in (1, 2, 100)}
    return phase


def run(method: Method, logits: Tensor, batch: Batch) -> tuple[float, Tensor]:
    """Returns the loss and its gradient by the logits."""
    logits = logits.clone().requires_grad_()
    step = phase_of(method, logits.shape[1]).loss(lambda images: logits[images.flatten().long()], {}, batch)
    (gradient,) = torch.autograd.grad(step.loss, logits)
    return float(step.loss.detach()), gradient


ALL = [DLLP(), EasyLLP(), GenBags(), CountLikelihood(), TopCount(), LLPVAT(lambda_vat=0)]
PRIOR = {"prior": torch.tensor([0.6, 0.4], dtype=torch.float64)}


@pytest.mark.parametrize("method", ALL, ids=lambda m: m.name)
def test_recipe_learns_bags_and_true_labels_in_one_phase_over_whole_bags(method: Method) -> None:
    phase, recipe = phase_of(method), method.recipe(task(2))
    assert recipe.uses == LabelKinds.TRUE | LabelKinds.BAGS | LabelKinds.AT_SERVER
    assert (phase.name, phase.teachers, phase.steps) == ("train", (), None)
    assert phase.draw == ByBag(labeled=("weak",), singles=False, least=4 if method.name == "gen_bags" else 1)
    assert not recipe.network.input_gradients


def test_rows_of_bags() -> None:
    rows, there = by_bag(P, MEMBERS)
    assert there.tolist() == (MEMBERS >= 0).tolist()
    assert rows[1].tolist() == [0.7, 0.4, 0, 0]
    assert bag_means(P, MEMBERS).tolist() == pytest.approx([0.45, 0.55, 0.8, 0.5])


@pytest.mark.parametrize("method", ALL, ids=lambda m: m.name)
def test_unknown_counts_have_no_say_and_a_labelled_sample_is_a_bag_of_one(method: Method) -> None:
    """Nothing of the last sample; the labelled one gives its cross-entropy, -log .8 (GenBags its square error)."""
    logits = two(P)
    _, gradient = run(method, logits, make_batch(PRIOR))
    assert gradient[7].abs().max() == 0
    assert (gradient[:7].abs().sum(1) > 0).all()
    alone = make_batch({"prior": torch.tensor([0.0, 1.0])}, torch.tensor([[0]]), torch.tensor([[0, 1]]))
    value, _ = run(method, two(P[6:7]), alone)
    expected = expected_square(torch.tensor(0.2).view(1, 1)).item() if method.name == "gen_bags" else -math.log(0.8)
    assert value == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("method", ALL, ids=lambda m: m.name)
def test_step_counts_the_samples_of_known_bags_and_their_error(method: Method) -> None:
    logits = two(P)
    step = phase_of(method).loss(lambda images: logits[images.flatten().long()], {}, make_batch(PRIOR))
    assert step.examples == 7
    error, bags = step.metrics["bag/share_error"].tolist()
    assert (error, bags) == (pytest.approx(0.2 + 0.05 + 0.2), 3)


def test_dllp() -> None:
    """p = (.9, .6, .2, .1), share .25: mean .45, loss .6480047; least at the share itself, .5623351."""
    predicted, share = torch.tensor([[0.55, 0.45]]), torch.tensor([[0.75, 0.25]])
    assert float(dllp_loss(predicted.log(), share)) == pytest.approx(0.6480047)
    assert float(dllp_loss(share.log(), share)) == pytest.approx(0.5623351)
    value, _ = run(DLLP(), two(P), make_batch())
    of_two = -0.5 * math.log(0.55) - 0.5 * math.log(0.45)
    assert value == pytest.approx((0.6480047 + of_two - math.log(0.8)) / 3)


def test_easy_llp() -> None:
    """k = 4, share .25, prior .3: weights (.1, .9) of classes (1, 0), loss .9113657 on the bag of the example."""
    weights = easy_weights(torch.tensor([[0.75, 0.25]]), torch.tensor([4.0]), torch.tensor([0.7, 0.3]))
    torch.testing.assert_close(weights, torch.tensor([[0.9, 0.1]]))
    memory = {"prior": torch.tensor([0.7, 0.3], dtype=torch.float64)}
    value, _ = run(EasyLLP(), two(P[:4]), make_batch(memory, MEMBERS[:1], COUNTS[:1]))
    assert value == pytest.approx(0.9113657)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_easy_llp_is_unbiased(size: int) -> None:
    """Over all labels of the others, drawn from the prior, a sample of class y has weight 1 for y, 0 for the rest."""
    prior = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    for own in range(3):
        mean = torch.zeros(3, dtype=torch.float64)
        for others in itertools.product(range(3), repeat=size - 1):
            counts = torch.bincount(torch.tensor([own, *others]), minlength=3).double()
            chance = math.prod(float(prior[label]) for label in others)
            mean += chance * easy_weights(counts[None] / size, torch.tensor([float(size)]).double(), prior)[0]
        torch.testing.assert_close(mean, torch.eye(3, dtype=torch.float64)[own])


def test_easy_llp_takes_the_clients_own_prior() -> None:
    """Bags with 3 + 1 zeros and 1 + 1 ones, and a labelled one: prior (4, 3) / 7; unlabelled samples do not count."""
    candidates = torch.ones(8, 2, dtype=torch.bool)
    candidates[6, 0] = False
    nobody = torch.zeros(8, 0, dtype=torch.int64)
    bag = torch.tensor([0, 0, 0, 0, 1, 1, -1, -1])
    supervision = Supervision(candidates, torch.zeros(8, dtype=torch.bool), nobody, bag, COUNTS[:2], nobody)
    assert phase_of(EasyLLP()).prepare is with_prior
    prepared = with_prior(Survey(lambda *_: torch.zeros(0), supervision, {"other": torch.ones(1)}))
    assert prepared.memory is not None
    assert prepared.memory.keys() == {"other", "prior"}
    assert EasyLLP().recipe(task(2)).memory.start is even_prior
    assert even_prior(candidates)["prior"].tolist() == [0.5, 0.5]
    assert prepared.memory["prior"].tolist() == pytest.approx([4 / 7, 3 / 7])


def test_gen_bags() -> None:
    """d = (.8, -.5, .2, .1): d'(1.331 I - .33 11')d = 1.13234, the mean over Gaussian weights, drawn here, too."""
    errors = torch.tensor([0.8, -0.5, 0.2, 0.1], dtype=torch.float64)
    assert float(expected_square(errors)) == pytest.approx(1.13234, abs=1e-6)
    covariance = 1.331 * torch.eye(4, dtype=torch.float64) - 0.33
    assert torch.linalg.eigvalsh(covariance).tolist() == pytest.approx([0.011, 1.331, 1.331, 1.331])
    drawn = torch.distributions.MultivariateNormal(torch.zeros(4).double(), covariance)
    torch.manual_seed(0)
    assert float((drawn.sample((200_000,)) @ errors).square().mean()) == pytest.approx(1.13234, rel=0.01)


def test_gen_bags_combines_bags_in_blocks_of_four() -> None:
    """Five bags of one sample: a block of four and one of one; both classes have the same error, mirrored."""
    members, counts = torch.arange(5)[:, None], torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0], [0, 1]])
    value, _ = run(GenBags(), two(P[:5]), make_batch({}, members, counts))
    errors = P[:5] - counts[:, 1]
    expected = (expected_square(errors[:4]) + expected_square(errors[4:])) / 5
    assert value == pytest.approx(float(expected))
    # d = (-.1, .6, -.8, .1): 1.331 * 1.02 - .33 * .04 = 1.34442; d = (-.3): (1.331 - .33) * .09 = .09009.
    assert value == pytest.approx((1.34442 + 0.09009) / 5, abs=1e-6)


def test_gen_bags_has_one_scale_whatever_the_number_of_bags() -> None:
    """All errors of one half with signs that cancel or not: near 1.331 / 4 a bag, and not less for an odd one out."""
    for bags in (1, 2, 4, 6, 8):
        members, counts = torch.arange(bags)[:, None], torch.eye(2).long()[torch.arange(bags) % 2]
        value, _ = run(GenBags(), two(torch.full((bags,), 0.5).double()), make_batch({}, members, counts))
        assert 0.24 < value < 0.35
    assert phase_of(GenBags()).draw == ByBag(least=4)


def test_count_likelihood_and_its_gradient() -> None:
    """-log p(count) by enumeration; the gradient by the log-odds is p - posterior: what EM would descend."""
    value, gradient = run(CountLikelihood(), two(P), make_batch())
    chance_four = sum(
        math.prod(float(p) if z else 1 - float(p) for p, z in zip(P[:4], labels, strict=True))
        for labels in itertools.product([0, 1], repeat=4)
        if sum(labels) == 1
    )
    chance_two = 0.7 * 0.6 + 0.3 * 0.4
    assert value == pytest.approx(-(math.log(chance_four) + math.log(chance_two) + math.log(0.8)) / 3)
    assert chance_four == pytest.approx(0.9 * 0.4 * 0.8 * 0.9 + 0.1 * (0.432 + 0.072 + 0.032))  # .3128
    assert value == pytest.approx((1.162191 + 0.616186 + 0.223144) / 3, abs=1e-6)  # -ln of .3128, .54, .8
    posterior = bag_posterior(P[:4].logit(), 1)
    torch.testing.assert_close(gradient[:4, 1], (P[:4] - posterior) / 3)


@pytest.mark.parametrize("count", [0, 1, 40, 130, 200, 599, 600])
def test_count_likelihood_of_a_large_bag(count: int) -> None:
    """600 samples, a third each with p = .1, .3 and .7, against the product of their polynomials q + p x.

    At most .2 off (see `count_log_likelihood`); .036 for a count of 599, which varies by one sample, was measured.
    """
    p = torch.tensor([0.1, 0.3, 0.7], dtype=torch.float64).repeat(200)
    value, gradient = run(
        CountLikelihood(), two(p), make_batch({}, torch.arange(600)[None], torch.tensor([[600 - count, count]]))
    )
    row = np.array([0.0])  # logarithms of the coefficients
    for one in p.tolist():
        row = np.logaddexp(np.append(row + math.log(1 - one), -np.inf), np.append(-np.inf, row + math.log(one)))
    assert value == pytest.approx(-row[count], abs=0.05 if count in (1, 599) else 1e-3)
    posterior = p + gradient[:, 0]  # of the logit of class 0: minus that of the log-odds
    assert float(posterior.sum()) == pytest.approx(count, abs=0.01)
    torch.testing.assert_close(posterior, bag_posterior(p.logit(), count), rtol=0, atol=2e-3)


def test_count_likelihood_of_several_classes_counts_each_against_the_rest() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    p = logits.softmax(1)
    torch.testing.assert_close(one_against_rest(logits).sigmoid(), p)
    value, _ = run(CountLikelihood(), logits, make_batch({}, torch.arange(4)[None], torch.tensor([[2, 2, 0]])))
    expected = 0.0
    for c, count in enumerate((2, 2, 0)):
        chance = sum(
            math.prod(float(p[i, c]) if z else 1 - float(p[i, c]) for i, z in enumerate(labels))
            for labels in itertools.product([0, 1], repeat=4)
            if sum(labels) == count
        )
        expected -= math.log(chance) / 3
    assert value == pytest.approx(expected)


def test_top_count() -> None:
    """One of (.9, .6, .2, .1), one of (.7, .4) and the labelled sample are ones; cross-entropy on that.

    -ln .9 - ln .4 - ln .8 - ln .9 = 1.350157 over four, -ln .7 - ln .6 = .867501 over two, -ln .8 = .223144: mean
    (.337539 + .433750 + .223144) / 3 = .331478.
    """
    scores, there = by_bag(P, MEMBERS)
    chosen = top_counts(scores, there, COUNTS[:, 1])
    assert chosen.tolist() == [
        [True, False, False, False],
        [True, False, False, False],
        [True] + [False] * 3,
        [False] * 4,
    ]
    assert top_counts(torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool), torch.tensor([2])).tolist() == [
        [True, True, False]
    ]
    value, gradient = run(TopCount(), two(P), make_batch())
    labels = torch.tensor([1, 0, 0, 0, 1, 0, 1])
    each = cross_entropy(two(P[:7]), labels, reduction="none")
    assert value == pytest.approx(float((each[:4].mean() + each[4:6].mean() + each[6]) / 3))
    assert value == pytest.approx(0.331478, abs=1e-6)
    torch.testing.assert_close(gradient[:4, 1], (P[:4] - labels[:4]) / 4 / 3)


def test_vat_moves_inputs_where_the_prediction_changes_most() -> None:
    """Logits w x: the divergence depends on w x alone, so the worst direction is +-w; the radius is its length."""
    w = torch.tensor([3.0, -4.0])
    inputs = torch.tensor([[0.1, 0.2], [0.5, -0.3]])
    seen: list[Tensor] = []

    def student(x: Tensor) -> Tensor:
        seen.append(x.detach())
        return torch.stack([torch.zeros(len(x)), x.flatten(1) @ w], 1)

    part = make_part(2, 2)._replace(members=torch.tensor([[0, 1]]), bag_counts=torch.tensor([[1, 1]]))
    part = part._replace(views={"weak": inputs.view(2, 2, 1, 1)})
    batch = make_batch()._replace(labeled=part)
    step = LLPVAT(radius=0.5).loss(student, {}, batch)
    moves = (seen[-1] - seen[0]).flatten(1)
    torch.testing.assert_close(moves.norm(dim=1), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close((moves @ w).abs(), torch.tensor([2.5, 2.5]), atol=1e-3, rtol=0)
    value, count = step.metrics["train/loss_vat"].tolist()
    clean, moved = (student(x).log_softmax(1) for x in (seen[0], seen[2]))
    assert count == 2
    assert value == pytest.approx(float(divergence(clean, moved).sum()), rel=1e-4)
    plain = LLPVAT(lambda_vat=0).loss(student, {}, batch)
    assert float(step.loss) == pytest.approx(float(plain.loss) + 0.05 * value / 2, rel=1e-4)


def test_vat_by_hand() -> None:
    """Inputs 0 of one number, logits (0, x ln 3): p = .5, and (.25, .75) or (.75, .25) at a distance of 1.

    Mean prediction .5 for a share of .5: ln 2 = .693147; (ln 2 - ln 1.5) / 2 = .143841, times .05: together .700339.
    """
    part = make_part(2, 2)._replace(members=torch.tensor([[0, 1]]), bag_counts=torch.tensor([[1, 1]]))
    part = part._replace(views={"weak": torch.zeros(2, 1, 1, 1)})

    def student(x: Tensor) -> Tensor:
        return torch.cat([torch.zeros(len(x), 1), math.log(3) * x.flatten(1)], 1)

    step = LLPVAT().loss(student, {}, make_batch()._replace(labeled=part))
    assert step.loss.item() == pytest.approx(0.693147 + 0.05 * 0.143841, abs=1e-6)


def test_vat_divergence_and_unit_length() -> None:
    """KL((.5, .5) || (.9, .1)) = .5 log(.5 / .9) + .5 log(.5 / .1) = .510826."""
    even, sure = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    assert float(divergence(even, sure)) == pytest.approx(0.510826, abs=1e-6)
    assert unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0, 0]]


@pytest.mark.parametrize("changes", [{"lambda_vat": -1.0}, {"radius": 0.0}, {"xi": 0.0}])
def test_bad_fields_are_named(changes: dict[str, float]) -> None:
    ((key, value),) = changes.items()
    with pytest.raises(ValueError, match=rf"`method.{key}` \(={value}\)"):
        LLPVAT(**changes)


def test_dllp_does_not_lose_its_gradient_where_it_is_most_wrong() -> None:
    """A bag of four, share .75, log-odds -20: p - share p / mean = -.75 / 4 each."""
    logits = torch.tensor([[0.0, -20.0]]).repeat(4, 1).double()
    _, gradient = run(DLLP(), logits, make_batch({}, torch.arange(4)[None], torch.tensor([[1, 3]])))
    assert gradient[:, 1].tolist() == pytest.approx([-0.75 / 4] * 4, rel=1e-6)


@pytest.mark.parametrize("method", [DLLP(), CountLikelihood(), TopCount(), EasyLLP()], ids=lambda m: m.name)
def test_who_shares_the_batch_does_not_matter(method: Method) -> None:
    """A labelled sample and a full bag beside a bag of 300, and beside nothing."""
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(303, generator=generator).double()
    members = torch.full((3, 300), -1)
    members[0] = torch.arange(300)
    members[1, :2] = torch.tensor([300, 301])
    members[2, 0] = 302
    counts = torch.tensor([[200, 100], [0, 2], [1, 0]])
    memory = {"prior": torch.tensor([0.6, 0.4], dtype=torch.float64)}
    _, together = run(method, two(p), make_batch(memory, members, counts))
    small = torch.tensor([[0, 1], [2, -1]])
    _, apart = run(method, two(p[300:]), make_batch(memory, small, counts[1:]))
    torch.testing.assert_close(together[300:] * 3, apart * 2, rtol=1e-6, atol=1e-5)


def test_count_likelihood_of_sure_predictions_in_a_padded_bag() -> None:
    """One sample of log-odds -80 that is counted beside a bag of two: log p = -80, and it is pulled up alone."""
    logits = torch.tensor([[0.0, -80.0], [0.0, 1.0], [0.0, -1.0]]).double()
    members, counts = torch.tensor([[0, -1], [1, 2]]), torch.tensor([[0, 1], [1, 1]])
    value, gradient = run(CountLikelihood(), logits, make_batch({}, members, counts))
    alone, _ = run(CountLikelihood(), logits[1:], make_batch({}, torch.tensor([[0, 1]]), counts[1:]))
    assert value == pytest.approx((80 + alone) / 2)
    assert float(gradient[0, 1]) == pytest.approx(-0.5)


def test_noisy_labels_are_no_bags_of_one() -> None:
    candidates = torch.eye(2, dtype=torch.bool)
    noisy, nobody = torch.tensor([True, False]), torch.zeros(2, 0, dtype=torch.int64)
    supervision = Supervision.without_bags(candidates, noisy, nobody)
    assert bag_units(supervision, singles=False).rows.tolist() == [[1]]
    prior = with_prior(Survey(lambda *_: torch.zeros(0), supervision, {})).memory
    assert prior is not None
    assert prior["prior"].tolist() == [0, 1]


def test_top_count_is_for_two_classes() -> None:
    TopCount().recipe(task(2))
    with pytest.raises(ValueError, match=r"`method.name` \(=top_count\) is for two classes, and there are 3: take"):
        TopCount().recipe(task(3))


def test_vat_asks_for_gradients_of_inputs() -> None:
    assert LLPVAT().recipe(task()).network.input_gradients
    assert not LLPVAT(lambda_vat=0).recipe(task()).network.input_gradients


def test_vat_refuses_batch_norm() -> None:
    """Its probe would change running statistics inside a derivative."""
    vat = ["method.name=llp_vat", "supervision.kind=bags", "supervision.bag_size=4", "device=cpu"]
    Experiment(load_config([], vat))
    for network in ("model.norm=batch", "model.name=torchvision:resnet18"):
        with pytest.raises(ValueError, match=r"its layer .* is BatchNorm, or .*, which method llp_vat cannot"):
            Experiment(load_config([], [*vat, network]))
    Experiment(load_config([], [*vat, "model.norm=batch", "method.lambda_vat=0"]))
