"""Client priors: estimated as worked out by hand, and added to what models say."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from fedlabel.data.labels.supervision import Supervision
from fedlabel.learning.client import ClientData, Trainer, train_client
from fedlabel.learning.prior import FLOOR, PriorConfig, client_prior, em_step, label_counts, smoothed, with_prior
from fedlabel.learning.training_config import TrainingConfig
from fedlabel.methods.supervised import Supervised
from tests.learning.clients import TRANSFORM
from tests.methods.recipes import task


def test_em_by_hand() -> None:
    """Four samples with p(x | 1) / p(x | 0) = 4, 1, 1/4, 1/4, from .5: the posteriors are .8, .5, .2, .2, so .425; then
    .7473, .425, .1560, .1560: .3711.
    """
    ratios = torch.tensor([4, 1, 0.25, 0.25], dtype=torch.float64)
    log_likelihood = torch.stack([torch.zeros(4).double(), ratios.log()], 1)
    none = torch.zeros(2).double()
    first = em_step(log_likelihood, torch.tensor([0.5, 0.5]).double(), none, 0.0)
    assert float(first[1]) == pytest.approx(0.425)
    assert float(em_step(log_likelihood, first, none, 0.0)[1]) == pytest.approx(0.3711, abs=1e-4)


def test_em_finds_the_most_likely_prior_and_never_gets_worse() -> None:
    """Of two Gaussians with means -1 and 1, against a fine grid."""
    generator = torch.Generator().manual_seed(0)
    classes = (torch.rand(400, generator=generator) < 0.2).double()
    x = torch.randn(400, generator=generator).double() + 2 * classes - 1
    log_likelihood = torch.stack([-((x + 1) ** 2) / 2, -((x - 1) ** 2) / 2], 1)

    def of(prior: torch.Tensor) -> float:
        return float((log_likelihood + prior.log()).logsumexp(1).sum())

    prior, values = torch.tensor([0.5, 0.5]).double(), []
    for _ in range(300):
        values.append(of(prior))
        prior = em_step(log_likelihood, prior, torch.zeros(2).double(), 0.0)
    assert all(after >= before - 1e-9 for before, after in pairwise(values))
    grid = torch.linspace(0.001, 0.999, 999).double()
    best = max(grid.tolist(), key=lambda p: of(torch.tensor([1 - p, p]).double()))
    assert float(prior[1]) == pytest.approx(best, abs=1.5e-3)


def test_federated_em_is_em_on_the_union_with_a_prior_per_group() -> None:
    """The sums of two clients' posteriors are those of one place that knows who is whose."""
    generator = torch.Generator().manual_seed(1)
    log_likelihood = torch.randn(30, 3, generator=generator).double()
    own = torch.tensor([0] * 12 + [1] * 18)
    priors = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]).double()
    for _ in range(5):
        together = (log_likelihood + priors[own].log()).softmax(1)
        sums = torch.stack([together[own == client].sum(0) for client in range(2)])
        apart = torch.stack(
            [em_step(log_likelihood[own == c], priors[c], torch.zeros(3).double(), 1.0) for c in range(2)]
        )
        expected = (sums + 1) / (sums.sum(1, keepdim=True) + 3)
        torch.testing.assert_close(apart, expected, rtol=0, atol=1e-12)
        priors = apart


def test_smoothing_and_floor() -> None:
    """(3 + 1) / 7, (1 + 1) / 7, (0 + 1) / 7; without smoothing a class that is not there has the floor."""
    counts = torch.tensor([3.0, 1, 0])
    torch.testing.assert_close(smoothed(counts, 1.0), torch.tensor([4, 2, 1]) / 7)
    assert float(smoothed(counts, 0.0)[2]) == pytest.approx(FLOOR)
    assert smoothed(torch.zeros(4), 0.0).tolist() == [0.25] * 4


def test_the_gradient_of_a_client_with_one_class_vanishes() -> None:
    """Without the prior its label pulls every logit; with it, the smaller the floor the less."""
    logits = torch.zeros(1, 3, requires_grad=True)
    label = torch.tensor([0])
    plain = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, label), logits)[0]
    assert float(plain.abs().max()) == pytest.approx(2 / 3)
    prior = smoothed(torch.tensor([50.0, 0, 0]), 0.0)
    adjusted = with_prior(lambda inputs: inputs, prior.log())(logits)
    kept = torch.autograd.grad(torch.nn.functional.cross_entropy(adjusted, label), logits)[0]
    assert float(kept.abs().max()) < 3e-6


def test_only_class_logits_are_adjusted() -> None:
    model = with_prior(lambda inputs, *part: inputs, torch.tensor([1.0, 2.0]))
    inputs = torch.zeros(3, 2)
    assert model(inputs).tolist() == model(inputs, "classify").tolist() == [[1, 2]] * 3
    assert model(inputs, "embed") is inputs
    assert with_prior(model, torch.zeros(0)) is model
    with pytest.raises(ValueError, match=r"`prior\.kind` needs a network whose outputs are the 3 classes"):
        with_prior(lambda inputs: inputs, torch.zeros(3))(inputs)


def one_hot(labels: list[int], classes: int = 3) -> torch.Tensor:
    """Returns candidates; -1 is no label."""
    return torch.stack([torch.ones(classes).bool() if c < 0 else torch.arange(classes) == c for c in labels])


def test_counts_of_all_kinds_of_label() -> None:
    """A label, a set of two, nothing, a noisy label, and a bag of two with counts (1, 1, 0)."""
    candidates = torch.tensor([[1, 0, 0], [0, 1, 1], [1, 1, 1], [0, 0, 1], [1, 1, 1], [1, 1, 1]]).bool()
    none = torch.zeros(6, 0, dtype=torch.int64)
    noisy = torch.tensor([0, 0, 0, 1, 0, 0]).bool()
    bag = torch.tensor([-1, -1, -1, -1, 0, 0])
    record = Supervision(candidates, noisy, none, bag, torch.tensor([[1, 1, 0]]), none)
    assert label_counts(record).tolist() == [2, 1.5, 1.5]
    # EM: the bag stays as it is counted, the noisy label may be any class, the set one of its two.
    logits = torch.tensor([[9.0, 0, 0]] * 6)
    found = client_prior(PriorConfig("em", smoothing=0.0, steps=50), record, logits)
    assert float(found.sum()) == pytest.approx(1, abs=1e-4)
    assert float(found[0]) == pytest.approx((1 + 1 + 1 + 1) / 6, abs=1e-2)


def trained(prior: PriorConfig, classes: list[int]) -> dict[str, torch.Tensor]:
    """Returns the model of a client with these labels after a round of labels only."""
    torch.manual_seed(0)
    module = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)) for _ in range(2)]
    start = {name: torch.zeros_like(value) for name, value in module[0].state_dict().items()}
    images = torch.randint(256, (len(classes), 1, 2, 2), dtype=torch.uint8)
    config = TrainingConfig(lr=0.5, local_steps=5, batch_size=4)
    trainer = replace(Trainer(*module, TRANSFORM, config), prior=prior)
    recipe = Supervised().recipe(task(3))
    data = ClientData(images, Supervision.certain(one_hot(classes)))
    return train_client(recipe, trainer, start, data, 1, seed=0).parts["model"].state


def test_a_uniform_prior_and_strength_0_change_nothing() -> None:
    """The labels are equally frequent, so that every kind finds the uniform prior: all logits move alike."""
    equal = [0, 1, 2] * 4
    plain = trained(PriorConfig(), equal)
    for prior in (PriorConfig("labels"), PriorConfig("labels", strength=0.0)):
        torch.testing.assert_close(trained(prior, equal), plain, rtol=1e-4, atol=1e-5)
    skewed = [0] * 10 + [1, 2]
    torch.testing.assert_close(trained(PriorConfig("labels", strength=0.0), skewed), trained(PriorConfig(), skewed))


def test_a_skewed_client_pulls_the_classifier_less() -> None:
    """Ten of twelve labels are of class 0: without the prior its bias rises most, with it hardly."""
    skewed = [0] * 10 + [1, 2]
    biases = {kind: trained(PriorConfig(kind), skewed)["1.bias"] for kind in ("none", "labels", "em")}
    gap = {kind: float(bias[0] - bias[1:].mean()) for kind, bias in biases.items()}
    assert gap["none"] > 0.5
    assert abs(gap["labels"]) < 0.4 * gap["none"]
    assert abs(gap["em"]) < 0.4 * gap["none"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kind": "label"}, r"`prior\.kind` \(=label\) must be one of none, labels, em"),
        ({"smoothing": -1.0}, r"`prior\.smoothing` \(=-1\.0\) must be"),
        ({"steps": 0}, r"`prior\.steps` \(=0\) must be at least 1"),
    ],
)
def test_bad_configurations_are_named(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PriorConfig(**keys)  # type: ignore[arg-type]
