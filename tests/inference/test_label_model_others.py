"""The label model beside others' of what both have: votes without silence (Dawid & Skene, 1979), and the analysis."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedlabel.inference.label_model import LabelModel
from fedlabel.learning.metrics import function_counts
from tests.inference.test_label_model import accuracy, simulate


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # crowd-kit uses what pandas gives up
def test_without_abstentions_it_is_dawid_skene() -> None:
    """3,000 samples, seven annotators of accuracies from .45 to .9, four classes of shares .4 to .1."""
    pandas = pytest.importorskip("pandas", reason="crowd-kit is not installed: pip install -e '.[crosscheck]'")
    aggregation = pytest.importorskip("crowdkit.aggregation", reason="pip install -e '.[crosscheck]'")
    rng = np.random.default_rng(0)
    truth = rng.choice(4, 3000, p=[0.4, 0.3, 0.2, 0.1])
    right = rng.random((3000, 7)) < np.linspace(0.45, 0.9, 7)
    votes = np.where(right, truth[:, None], (truth[:, None] + rng.integers(1, 4, (3000, 7))) % 4)
    task, worker = np.indices(votes.shape).reshape(2, -1)
    frame = pandas.DataFrame({"task": task, "worker": worker, "label": votes.ravel()})
    theirs = aggregation.DawidSkene(n_iter=200, tol=1e-9).fit_predict_proba(frame)[[0, 1, 2, 3]].sort_index()

    everything = torch.ones(7, 4, dtype=torch.bool)
    model = LabelModel(4, everything, smoothing=1e-9).fit(torch.from_numpy(votes), max_iterations=200, tolerance=1e-12)
    ours = model.posterior(torch.from_numpy(votes)).numpy()
    assert (ours.argmax(1) == theirs.to_numpy().argmax(1)).all()
    assert np.abs(ours - theirs.to_numpy()).max() < 1e-3


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_analysis_is_that_of_snorkel() -> None:
    analysis = pytest.importorskip("snorkel.labeling", reason="pip install -e '.[crosscheck]'").LFAnalysis
    votes, sets, y, _ = simulate(1, n=400, k=12)
    theirs = analysis(votes.numpy())
    counts = function_counts(votes, sets, y)
    cast = np.reshape(counts["function_votes"], (12, 10)).sum(1)
    overlap, conflict, right, known = np.reshape(counts["function_counts"], (12, 4)).T
    assert np.allclose(cast / 400, theirs.lf_coverages())
    assert np.allclose(overlap / 400, theirs.lf_overlaps())
    assert np.allclose(conflict / 400, theirs.lf_conflicts())
    assert (known == cast).all()
    assert np.allclose(right / known, theirs.lf_empirical_accuracies(y.numpy()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_silence_is_evidence_that_snorkels_model_has_not() -> None:
    """Functions that specialise: 2,000 samples, 50 functions; measured .97 and .74."""
    model = pytest.importorskip("snorkel.labeling.model", reason="pip install -e '.[crosscheck]'").LabelModel
    votes, sets, y, _ = simulate(0, n=2000)
    theirs = model(10, verbose=False)
    theirs.fit(votes.numpy(), n_epochs=100, seed=0)
    ours = LabelModel(10, sets).fit(votes).posterior(votes)
    assert accuracy(ours, y) > accuracy(torch.from_numpy(theirs.predict_proba(votes.numpy())), y) + 0.05
