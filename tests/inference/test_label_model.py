"""The label model: checks 1 to 6, 9 and 11 of DP-SSL's specification."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlabel.inference.label_model import LabelModel, client_prior, coverage_normalized_votes, majority_vote

CLASSES = ("horse", "deer", "monkey", "dog", "cat")
FIGURE = torch.tensor([[0, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 1], [0, 0, 1, 0, 0]]).bool()
"""The sets of the paper's figure: {monkey, deer}, {horse, dog}, {cat, dog, horse}, {monkey}."""
VARIANTS = ("full", "tied", "cage")


def tied_tables(sets: Tensor, right: float, wrong: float, outside: float) -> Tensor:
    """T of the tied variant, straight from its definition."""
    k, c = sets.shape
    tables = torch.zeros(k, c + 1, c, dtype=torch.float64)
    for f in range(k):
        own = sets[f].nonzero().flatten().tolist()
        error = wrong if len(own) > 1 else 0.0
        for y in range(c):
            for v in own:
                if y in own:
                    tables[f, v, y] = right if v == y else error / (len(own) - 1)
                else:
                    tables[f, v, y] = outside / len(own)
            tables[f, c, y] = 1 - tables[f, :c, y].sum()
    return tables


def figure(right: float = 0.8, wrong: float = 0.05, outside: float = 0.2, **changes: bool) -> LabelModel:
    model = LabelModel(5, FIGURE, "tied", **changes)  # type: ignore[arg-type]
    model.tables = tied_tables(FIGURE, right, wrong, outside)
    return model


@cache
def simulate(seed: int, n: int = 5000, k: int = 50, c: int = 10) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Check 9's recipe: votes, class sets, true classes, true T."""
    rng = np.random.default_rng(seed)
    sets = np.zeros((k, c), bool)
    for f in range(k):
        sets[f, rng.choice(c, rng.integers(1, 4), replace=False)] = True
    hit, false_alarm = rng.uniform(0.25, 0.75, (k, c)), rng.uniform(0.05, 0.45, (k, c))
    y = rng.integers(0, c, n)
    votes, tables = np.full((n, k), -1), np.zeros((k, c + 1, c))
    for f in range(k):
        own = np.flatnonzero(sets[f])
        inside, member = sets[f][y], rng.choice(own, n)
        hits = inside & (rng.random(n) < hit[f, y])
        strays = inside & ~hits & (rng.random(n) < 0.3)
        alarms = ~inside & (rng.random(n) < false_alarm[f, y])
        votes[hits, f] = y[hits]
        votes[strays | alarms, f] = member[strays | alarms]
        for label in range(c):
            if sets[f, label]:
                tables[f, label, label] = hit[f, label]
                tables[f, own, label] += 0.3 * (1 - hit[f, label]) / len(own)
            else:
                tables[f, own, label] = false_alarm[f, label] / len(own)
            tables[f, c, label] = 1 - tables[f, :c, label].sum()
    return torch.from_numpy(votes), torch.from_numpy(sets), torch.from_numpy(y), torch.from_numpy(tables)


def accuracy(posterior: Tensor, truth: Tensor) -> float:
    return float((posterior.argmax(1) == truth).double().mean())


def even(c: int = 10) -> Tensor:
    return torch.ones(c)


# ----------------------------------------------------------------------------------------------------------- posteriors


def test_the_papers_figure() -> None:
    """Check 1: votes (monkey, abstain, cat, monkey)."""
    votes = torch.tensor([[2, -1, 4, 2]])
    model = figure()
    expected = [[0.001575, 0.011201, 0.716836, 0.001575, 0.268813]]
    torch.testing.assert_close(model.posterior(votes), torch.tensor(expected).double(), rtol=0, atol=1e-6)
    assert float(model.log_likelihood(votes).exp() * 5) == pytest.approx(0.0476167, abs=1e-7)
    deaf = figure(abstentions=False)
    expected = [[0.008287, 0.011050, 0.707182, 0.008287, 0.265193]]
    torch.testing.assert_close(deaf.posterior(votes), torch.tensor(expected).double(), rtol=0, atol=1e-6)


def test_a_row_without_votes_speaks_for_what_few_functions_cover() -> None:
    """Check 2; where functions never speak it is the prior."""
    silent = torch.full((1, 4), -1)
    expected = [[0.071429, 0.380952, 0.095238, 0.071429, 0.380952]]
    torch.testing.assert_close(figure().posterior(silent), torch.tensor(expected).double(), rtol=0, atol=1e-6)
    mute = figure(0.0, 0.0, 0.0)
    mute.prior = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.1]).double()
    torch.testing.assert_close(mute.posterior(silent), mute.prior[None])


def test_three_functions_of_two_classes() -> None:
    """Check 3: accuracy .8; votes (0, 0, 1) give .8, (0, 0, 0) .984615; EM finds the accuracies, and so do triplets."""
    sets = torch.ones(3, 2, dtype=torch.bool)
    model = LabelModel(2, sets)
    model.tables = tied_tables(sets, 0.8, 0.2, 0.0)
    found = model.posterior(torch.tensor([[0, 0, 1], [0, 0, 0]]))[:, 0]
    assert found.tolist() == pytest.approx([0.8, 0.512 / 0.52])
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 50_000)
    votes = torch.from_numpy(np.where(rng.random((50_000, 3)) < 0.8, y[:, None], 1 - y[:, None]))
    fitted = LabelModel(2, sets, prior=even(2)).fit(votes)
    right = fitted.tables[:, :2].diagonal(dim1=1, dim2=2).mean(1)
    assert right.tolist() == pytest.approx([0.8] * 3, abs=0.02)
    signs = 2 * votes.double() - 1
    e = (signs.T @ signs) / len(signs)
    assert float((e[0, 1] * e[0, 2] / e[1, 2]).sqrt()) == pytest.approx(0.6, abs=0.02)


def test_perfect_functions_are_believed_at_once() -> None:
    """Check 4."""
    y = torch.arange(1000) % 5
    votes = torch.where(y[:, None] == torch.arange(5), y[:, None], -1)
    model = LabelModel(5, torch.eye(5, dtype=torch.bool)).fit(votes)
    posterior = model.posterior(votes)
    assert accuracy(posterior, y) == 1
    assert float(posterior.amax(1).min()) > 0.9999
    assert model.iterations <= 3  # two steps, and one look that nothing changed


def test_a_function_that_says_the_same_of_all_classes_says_nothing_and_a_second_copy_counts_again() -> None:
    votes = torch.tensor([[2, -1, 4, 2], [-1, 0, 3, -1]])
    model = figure()
    before = model.posterior(votes)
    more = LabelModel(5, torch.cat([FIGURE, torch.ones(1, 5, dtype=torch.bool)]), "tied")
    more.tables = torch.cat([model.tables, torch.full((1, 6, 5), 1 / 6, dtype=torch.float64)])
    torch.testing.assert_close(more.posterior(torch.cat([votes, votes[:, :1]], 1)), before)
    twice = LabelModel(5, torch.cat([FIGURE, FIGURE[:1]]), "tied")
    twice.tables = torch.cat([model.tables, model.tables[:1]])
    change = twice.posterior(torch.cat([votes, votes[:, :1]], 1)).log() - before.log()
    own = torch.stack([model.tables[0, 2], model.tables[0, 5]]).log()
    torch.testing.assert_close(change - change[:, :1], own - own[:, :1])


def test_temperature_flattens() -> None:
    votes = torch.tensor([[2, -1, 4, 2]])
    sharp, flat = figure(), LabelModel(5, FIGURE, "tied", temperature=0.5)
    flat.tables = sharp.tables
    expected = (sharp.posterior(votes).log() / 2).softmax(1)  # the prior is even
    torch.testing.assert_close(flat.posterior(votes), expected)
    assert torch.equal(flat.log_likelihood(votes), sharp.log_likelihood(votes))
    assert float(flat.expected_counts(votes).log_likelihood) == pytest.approx(float(sharp.log_likelihood(votes)))


# ------------------------------------------------------------------------------------------------------------------- EM


@pytest.mark.parametrize("variant", VARIANTS)
def test_tables_are_distributions_inside_the_sets(variant: str) -> None:
    """Check 5."""
    votes, sets, _, _ = simulate(0, n=800, k=30)
    model = LabelModel(10, sets, variant).fit(votes, max_iterations=4)
    torch.testing.assert_close(model.tables.sum(1), torch.ones(30, 10).double())
    outside = torch.cat([~sets, torch.zeros(30, 1, dtype=torch.bool)], 1)
    assert model.tables[outside].abs().max() == 0
    torch.testing.assert_close(model.posterior(votes).sum(1), torch.ones(800).double())
    assert float(model.prior.sum()) == pytest.approx(1)


@pytest.mark.parametrize("learnt", [True, False])
def test_penalised_likelihood_never_falls(learnt: bool) -> None:
    """Check 5: log-likelihood plus the logarithm of the Dirichlet priors that the pseudo-counts are."""
    votes, sets, _, _ = simulate(1, n=600, k=25)
    model = LabelModel(10, sets, prior=None if learnt else even())
    possible = torch.cat([sets, torch.ones(25, 1, dtype=torch.bool)], 1)
    model.update(model.initial_counts(votes))
    before = -float("inf")
    for _ in range(25):
        weight = (1.0 / possible.sum(1))[:, None, None] * possible[:, :, None]
        penalty = (weight * model.tables.clamp_min(1e-300).log()).sum() + (model.prior.log().sum() if learnt else 0)
        now = float(model.log_likelihood(votes).sum() + penalty)
        assert now >= before - 1e-9 * abs(now)
        before = now
        model.update(model.expected_counts(votes))


@pytest.mark.parametrize("variant", VARIANTS)
def test_sums_of_clients_give_the_model_of_the_pooled_votes(variant: str) -> None:
    """Federated EM is EM on the union."""
    votes, sets, _, _ = simulate(2, n=900, k=20)
    central, federated = LabelModel(10, sets, variant), LabelModel(10, sets, variant)
    parts = votes.split([500, 1, 399])
    for step in range(6):
        for model, own in ((central, [votes]), (federated, parts)):
            counts = [model.initial_counts(v) if step == 0 else model.expected_counts(v) for v in own]
            total = counts[0]
            for more in counts[1:]:
                total = total + more
            model.update(total)
    torch.testing.assert_close(federated.tables, central.tables, rtol=0, atol=1e-6)
    torch.testing.assert_close(federated.prior, central.prior, rtol=0, atol=1e-6)
    torch.testing.assert_close(federated.posterior(votes), central.posterior(votes), rtol=0, atol=1e-6)


def test_order_of_samples_functions_and_classes_does_not_matter() -> None:
    """Checks 5 and 6."""
    votes, sets, _, _ = simulate(3, n=700, k=20)
    expected = LabelModel(10, sets).fit(votes).posterior(votes)
    generator = torch.Generator().manual_seed(0)
    samples, functions, classes = (torch.randperm(size, generator=generator) for size in (700, 20, 10))
    found = LabelModel(10, sets).fit(votes[samples]).posterior(votes[samples])
    torch.testing.assert_close(found, expected[samples])
    found = LabelModel(10, sets[functions]).fit(votes[:, functions]).posterior(votes[:, functions])
    torch.testing.assert_close(found, expected)
    renamed = torch.where(votes >= 0, classes[votes.clamp_min(0)], -1)
    moved = torch.zeros_like(sets)
    moved[:, classes] = sets
    found = LabelModel(10, moved).fit(renamed).posterior(renamed)
    torch.testing.assert_close(found[:, classes], expected)


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    votes, sets, y, _ = simulate(0, n=500, k=25)
    labels = torch.where(torch.arange(500) % 7 == 0, y, -1)
    whole = LabelModel(10, sets).fit(votes, labels)
    monkeypatch.setattr("fedlabel.inference.label_model._CHUNK", 64)
    parts = LabelModel(10, sets).fit(votes, labels)
    torch.testing.assert_close(parts.tables, whole.tables)
    torch.testing.assert_close(parts.posterior(votes), whole.posterior(votes))


def test_many_functions_give_no_nan() -> None:
    """Check 5: log domain. The likelihood of 1,500 votes is below the smallest number there is."""
    votes, sets, y, _ = simulate(4, n=600, k=1500)
    model = LabelModel(10, sets).fit(votes, max_iterations=5)
    assert (model.log_likelihood(votes) < -800).all()
    posterior = model.posterior(votes)
    assert posterior.isfinite().all()
    assert accuracy(posterior, y) > 0.999


def test_many_samples_give_no_nan() -> None:
    """Check 5: 100 functions, 100,000 samples."""
    votes, sets, y, _ = simulate(0, n=100_000, k=100)
    model = LabelModel(10, sets, prior=even()).fit(votes, max_iterations=2)
    posterior = model.posterior(votes)
    assert posterior.isfinite().all()
    assert model.tables.isfinite().all()
    assert accuracy(posterior, y) > 0.99


# ------------------------------------------------------------------------------------------------------------- recovery


@pytest.mark.parametrize("seed", [0, 2])
def test_recovery(seed: int) -> None:
    """Check 9: at least .95, near the true T; above votes by coverage > plain votes > EM blind to silence."""
    votes, sets, y, tables = simulate(seed)
    fitted = accuracy(LabelModel(10, sets, prior=even()).fit(votes).posterior(votes), y)
    oracle = LabelModel(10, sets, prior=even())
    oracle.tables = tables
    best = accuracy(oracle.posterior(votes), y)
    covered = accuracy(coverage_normalized_votes(votes, sets), y)
    plain = accuracy(majority_vote(votes, 10), y)
    blind = accuracy(LabelModel(10, sets, prior=even(), abstentions=False).fit(votes).posterior(votes), y)
    assert fitted >= 0.95
    assert fitted >= best - 0.02
    assert fitted > covered > plain > blind


def test_recovery_grows_with_functions_and_is_calibrated() -> None:
    """Check 9: K = 10 < 25 < 50 (measured .645, .898, .986); of what is believed above .95, .99 is right."""
    results = []
    for k in (10, 25, 50):
        votes, sets, y, _ = simulate(3, k=k)  # whose ten functions cover all classes
        assert sets.any(0).all()
        posterior = LabelModel(10, sets, prior=even()).fit(votes).posterior(votes)
        results.append(accuracy(posterior, y))
    assert results[0] + 0.1 < results[1] < results[2] - 0.05
    sure = posterior.amax(1) > 0.95
    assert float(sure.double().mean()) > 0.8
    assert accuracy(posterior[sure], y[sure]) >= 0.99


def test_what_is_sure_is_right() -> None:
    """Check 9 at n = 50,000 (the specification measured 88 % of the samples above .95, 99.7 % of these right)."""
    votes, sets, y, _ = simulate(0, n=50_000)
    posterior = LabelModel(10, sets, prior=even()).fit(votes).posterior(votes)
    sure = posterior.amax(1) > 0.95
    assert float(sure.double().mean()) > 0.85
    assert accuracy(posterior[sure], y[sure]) >= 0.99


def test_likelihood_of_tied_tables_never_falls() -> None:
    """Check 5 for the other M step in closed form, with next to no smoothing: the log-likelihood itself."""
    votes, sets, _, _ = simulate(1, n=600, k=25)
    model = LabelModel(10, sets, "tied", smoothing=1e-9)
    model.update(model.initial_counts(votes))
    first = before = float(model.log_likelihood(votes).sum())
    for _ in range(25):
        model.update(model.expected_counts(votes))
        now = float(model.log_likelihood(votes).sum())
        assert now >= before - 1e-9 * abs(now)
        before = now
    assert before > first + 100


@pytest.mark.parametrize("variant", ["tied", "cage"])
def test_other_variants_learn_too(variant: str) -> None:
    votes, sets, y, _ = simulate(0, n=2000)
    model = LabelModel(10, sets, variant, prior=even()).fit(votes)
    assert accuracy(model.posterior(votes), y) > accuracy(majority_vote(votes, 10), y) + 0.03


def test_tied_update_is_the_weighted_share_of_each_outcome() -> None:
    """By hand, with certain classes: function of {0, 1}; five samples of class 0, two of class 2."""
    sets = torch.tensor([[1, 1, 0], [0, 0, 1]]).bool()
    model = LabelModel(3, sets, "tied", smoothing=1e-9)
    votes = torch.tensor([[0, -1], [0, -1], [0, -1], [1, -1], [-1, -1], [1, 2], [-1, 2]])
    model.update(model.expected_counts(votes, torch.tensor([0, 0, 0, 0, 0, 2, 2])))
    expected = [[0.6, 0.2, 0.25], [0.2, 0.6, 0.25], [0, 0, 0], [0.2, 0.2, 0.5]]
    torch.testing.assert_close(model.tables[0], torch.tensor(expected).double(), rtol=0, atol=1e-6)


def test_full_update_shares_its_smoothing_to_the_last_bit() -> None:
    """The same votes: 1 is shared by the three votes of {0, 1}. Class 0: (3, 1, 1) + 1/3 of 6; 2: (0, 1, 1) of 3."""
    sets = torch.tensor([[1, 1, 0], [0, 0, 1]]).bool()
    model = LabelModel(3, sets, "full", smoothing=1)
    votes = torch.tensor([[0, -1], [0, -1], [0, -1], [1, -1], [-1, -1], [1, 2], [-1, 2]])
    model.update(model.expected_counts(votes, torch.tensor([0, 0, 0, 0, 0, 2, 2])))
    expected = [[10 / 18, 1 / 3, 1 / 9], [4 / 18, 1 / 3, 4 / 9], [0, 0, 0], [4 / 18, 1 / 3, 4 / 9]]
    torch.testing.assert_close(model.tables[0], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-15)


def test_known_classes_are_held_and_weighed() -> None:
    votes, sets, y, _ = simulate(1, n=300, k=25)
    model = LabelModel(10, sets)
    labels = torch.where(torch.arange(300) < 100, y, -1)
    counts = model.expected_counts(votes, labels, 3.0)
    free = model.posterior(votes[100:]).sum(0)
    torch.testing.assert_close(counts.classes, 3 * torch.bincount(y[:100], minlength=10) + free)
    none = model.expected_counts(votes, labels, 0.0)
    torch.testing.assert_close(none.classes, free)
    alone, weightless = LabelModel(10, sets), LabelModel(10, sets)
    alone.fit(votes[100:], max_iterations=3)
    weightless.fit(votes, labels, label_weight=0.0, max_iterations=3)
    torch.testing.assert_close(weightless.tables, alone.tables)


def test_one_function_of_all_classes_is_its_own_vote() -> None:
    """Check 11: pseudo-labels."""
    votes = torch.randint(4, (200, 1), generator=torch.Generator().manual_seed(0))
    model = LabelModel(4, torch.ones(1, 4, dtype=torch.bool), "tied").fit(votes)
    assert torch.equal(model.posterior(votes).argmax(1), votes[:, 0])


def test_votes_alone_are_even_where_none_was_cast() -> None:
    votes = torch.tensor([[0, -1], [-1, -1], [0, 1]])
    torch.testing.assert_close(majority_vote(votes, 2), torch.tensor([[1, 0], [0.5, 0.5], [0.5, 0.5]]).double())
    sets = torch.tensor([[1, 1], [0, 1]]).bool()
    expected = torch.tensor([[1, 0], [0, 0], [1, 0.5]]).double()
    torch.testing.assert_close(coverage_normalized_votes(votes, sets), expected)


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "snorkel"}, r"`variant` \(=snorkel\) must be one of full, tied, cage"),
        ({"class_sets": torch.ones(2, 3)}, r"`class_sets` \(torch.float32"),
        ({"class_sets": torch.ones(2, 4).bool()}, r"`class_sets` .* must be bool of shape \(functions, 3\)"),
        ({"class_sets": torch.tensor([[1, 1, 1], [0, 0, 0]]).bool()}, "`class_sets` of function 1 is empty"),
        ({"class_sets": torch.tensor([[1, 0, 1], [1, 0, 0]]).bool()}, "no function votes for class 1"),
        ({"smoothing": 0.0}, r"`smoothing` \(=0.0\)"),
        ({"temperature": 1.5}, r"`temperature` \(=1.5\)"),
        ({"guide": 1.0}, r"`guide` \(=1.0\)"),
        ({"prior": torch.ones(2)}, "`prior`"),
        ({"prior": torch.tensor([1.0, 0, 1])}, "`prior`"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelModel(**({"num_classes": 3, "class_sets": torch.ones(2, 3).bool()} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("votes", "message"),
    [
        (torch.tensor([[2, -1, 4, 2], [2, 2, -1, 2]]), r"vote of function 1 on sample 1 \(=2\) .* \[0, 3\], or -1"),
        (torch.tensor([[5, -1, 4, 2]]), r"vote of function 0 on sample 0 \(=5\)"),
        (torch.tensor([[-2, -1, 4, 2]]), r"vote of function 0 on sample 0 \(=-2\)"),
        (torch.tensor([[2, -1, 4]]), r"`votes` .* must be int64 of shape \(n, 4\)"),
        (torch.tensor([[2.0, -1, 4, 2]]), r"`votes` \(torch.float32"),
    ],
)
def test_bad_votes_are_named(votes: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelModel(5, FIGURE).posterior(votes)


def test_nothing_to_fit_is_named() -> None:
    with pytest.raises(ValueError, match="`votes` has no rows"):
        LabelModel(5, FIGURE).fit(torch.zeros(0, 4, dtype=torch.int64))


def test_arrays_and_lists_will_do() -> None:
    sets, votes = [[True, False, True], [True, True, False], [False, True, True]], [[0, 0, -1], [2, -1, 2], [-1, 1, 1]]
    of_lists = LabelModel(3, sets).fit(votes).posterior(votes)  # type: ignore[arg-type]
    of_arrays = LabelModel(3, np.array(sets)).fit(np.array(votes)).posterior(np.array(votes))  # type: ignore[arg-type]
    of_tensors = LabelModel(3, torch.tensor(sets)).fit(torch.tensor(votes)).posterior(torch.tensor(votes))
    assert torch.equal(of_lists, of_tensors)
    assert torch.equal(of_arrays, of_tensors)


@pytest.mark.parametrize("variant", ["full", "tied", "cage"])
def test_every_fit_begins_anew(variant: str) -> None:
    votes, sets = simulate(0, n=400, k=20)[:2]
    model = LabelModel(10, sets, variant).fit(votes[:100]).fit(votes)
    torch.testing.assert_close(model.posterior(votes), LabelModel(10, sets, variant).fit(votes).posterior(votes))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0], r"`labels` \(torch.int64 of shape \(1,\)\) must be int64 of shape \(3,\)"),
        ([0.0, 1.0, 1.0], r"`labels` \(torch.float32 of shape \(3,\)\) must be int64"),
        ([0, 5, -1], r"The label of sample 1 \(=5\) must lie in \[0, 1\]"),
        ([0, -2, -1], r"The label of sample 1 \(=-2\)"),
    ],
)
def test_wrong_labels_are_named(labels: list[float], message: str) -> None:
    model, votes = LabelModel(2, [[True, True]]), torch.tensor([[0], [1], [-1]])
    for call in (model.fit, model.expected_counts, model.initial_counts):
        with pytest.raises(ValueError, match=message):
            call(votes, torch.tensor(labels))
    assert model.expected_counts(votes, np.array([0, -1, 1])).classes.sum() == pytest.approx(3)


def test_prior_may_be_a_list_and_must_be_finite() -> None:
    assert LabelModel(2, [[True, True]], prior=[1, 3]).prior.tolist() == [0.25, 0.75]
    with pytest.raises(ValueError, match=r"`prior` \(=\[1.0, inf\]\) must be 2 positive, finite numbers"):
        LabelModel(2, [[True, True]], prior=[1, math.inf])


# ------------------------------------------------------------------------------------------- a client's own classes


def skewed(seed: int = 0) -> tuple[LabelModel, Tensor]:
    """A model fitted to all, and the votes on a client that has mostly classes 0 and 1."""
    votes, sets, y, _ = simulate(seed, n=2000, k=15)
    model = LabelModel(10, sets).fit(votes)
    mine = (y < 2) | (torch.arange(2000) % 20 == 0)
    return model, votes[mine]


def test_client_prior_is_em_of_the_prior_alone() -> None:
    """Fifty steps, a sample and a class at a time."""
    model, votes = skewed()
    votes = votes[:25]
    likelihood = [
        [math.prod(float(model.tables[k, v if v >= 0 else 10, c]) for k, v in enumerate(row)) for c in range(10)]
        for row in votes.tolist()
    ]
    prior = model.prior.tolist()
    for _ in range(50):
        new = [1.0] * 10  # smoothing
        for row in likelihood:
            joint = [p * value for p, value in zip(prior, row, strict=True)]
            new = [count + value / sum(joint) for count, value in zip(new, joint, strict=True)]
        prior = [count / sum(new) for count in new]
    assert client_prior(model, votes).tolist() == pytest.approx(prior, abs=1e-9)


def test_client_prior_is_likelier_and_near_the_clients_shares() -> None:
    """Log-likelihood and the logarithm of the Dirichlet prior that the pseudo-counts are."""
    model, votes = skewed()
    before = model.prior

    def penalised(prior: Tensor) -> float:
        model.prior = prior
        value = float(model.log_likelihood(votes).sum() + prior.log().sum() / 10)
        model.prior = before
        return value

    found = client_prior(model, votes)
    assert float(found.sum()) == pytest.approx(1)
    assert penalised(found) > penalised(before) + 20
    assert penalised(found) >= max(penalised(0.9 * found + 0.1 * torch.eye(10).double()[c]) for c in range(10))
    assert found[:2].sum() > 0.5  # .64; .83 in truth
    assert before[:2].sum() < 0.3
    assert torch.equal(model.prior, before)
