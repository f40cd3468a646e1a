"""The label model beside another implementation of the case that both have: nobody abstains (Dawid & Skene, 1979)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedlabel.inference.label_model import LabelModel

pandas = pytest.importorskip("pandas", reason="crowd-kit is not installed: pip install -e '.[crosscheck]'")
aggregation = pytest.importorskip("crowdkit.aggregation", reason="pip install -e '.[crosscheck]'")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # crowd-kit uses what pandas gives up
def test_without_abstentions_it_is_dawid_skene() -> None:
    """3,000 samples, seven annotators of accuracies from .45 to .9, four classes of shares .4 to .1."""
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
