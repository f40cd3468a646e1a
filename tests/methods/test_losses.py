"""What the shared losses refuse."""

from __future__ import annotations

import pytest
import torch

from fedlabel.methods.losses import labeled_step, semi_supervised_step

SUPERVISED = labeled_step(torch.zeros(2, 3), torch.eye(3, dtype=torch.bool)[:2])


@pytest.mark.parametrize(("unsupervised", "keep"), [((4,), ()), ((4,), (3,)), ((), ()), ((4, 1), (4, 1))])
def test_one_value_per_sample(unsupervised: tuple[int, ...], keep: tuple[int, ...]) -> None:
    """A single `keep` would count as one sample."""
    mask = torch.ones(keep, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"`keep` \(of shape .*\) must both be \(n,\)"):
        semi_supervised_step(SUPERVISED, torch.ones(unsupervised), 1.0, mask)
    step = semi_supervised_step(SUPERVISED, torch.ones(4), 1.0, torch.ones(4, dtype=torch.bool))
    assert float(step.examples) == 6
