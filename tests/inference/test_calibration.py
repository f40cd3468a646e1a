"""Temperatures and mixture weights against worked numbers, a fine grid and their limits."""

from __future__ import annotations

import math

import pytest
import torch

from fedlabel.inference.calibration import LARGEST, inverse_temperature, mixture_weight


def test_temperature_by_hand() -> None:
    """Logits (4, 0), three of four labels are class 0, the pseudo-sample is so with p = 1 / (1 + e^-4) = .982014.

    So (1 + 1/4) sigmoid(4b) * 4 = (3 + .982014) / 4 for each sample: sigmoid(4b) = .796403, b = ln(3.911667) / 4.
    """
    logits, labels = torch.tensor([[4.0, 0.0]] * 4), torch.tensor([0, 0, 0, 1])
    assert inverse_temperature(logits, labels).item() == pytest.approx(math.log(3.911667) / 4, abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_temperature_maximises_the_posterior(seed: int) -> None:
    """Against a grid; labels are drawn from a third of the logits."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(200, 5, generator=generator)
    labels = torch.multinomial((logits / 3).softmax(1), 1, generator=generator).flatten()
    weights = torch.nn.functional.one_hot(labels, 5) + logits.softmax(1) / 200
    grid = torch.linspace(0.05, 2, 1951)
    values = torch.stack([-(weights * (b * logits).log_softmax(1)).sum() for b in grid])
    found = float(inverse_temperature(logits, labels))
    assert found == pytest.approx(float(grid[values.argmin()]), abs=2e-3)
    assert 0.2 < found < 0.5


def test_temperature_in_the_limits() -> None:
    """Without labels 1; labels as the model says leave it nearly at 1; all right makes it surer, all wrong less so."""
    assert inverse_temperature(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)).item() == 1
    logits = torch.tensor([[math.log(3), 0.0]] * 4)
    assert inverse_temperature(logits, torch.tensor([0, 0, 0, 1])).item() == pytest.approx(1, abs=1e-6)
    assert 1 < inverse_temperature(logits, torch.zeros(4, dtype=torch.int64)).item() < LARGEST
    assert inverse_temperature(logits, torch.ones(4, dtype=torch.int64)).item() == pytest.approx(1 / LARGEST, rel=1e-4)


def test_mixture_weight_by_hand() -> None:
    """One label with p = .8 and .2: w = (r + 1) / 3 with r = .8 w / (.8 w + .2 (1 - w)), so 9 w^2 - 4 w - 1 = 0."""
    first, second = torch.tensor([0.8]).log(), torch.tensor([0.2]).log()
    weight = (4 + math.sqrt(52)) / 18
    assert weight == pytest.approx((0.8 * weight / (0.6 * weight + 0.2) + 1) / 3)
    assert mixture_weight(first, second).item() == pytest.approx(weight, abs=1e-5)
    assert mixture_weight(second, first).item() == pytest.approx(1 - weight, abs=1e-5)


def test_mixture_weight_is_the_most_likely_and_has_limits() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 60, generator=generator)
    grid = torch.linspace(0.001, 0.999, 999)
    values = (grid[:, None] * first + (1 - grid[:, None]) * second).log().sum(1) + grid.log() + (1 - grid).log()
    assert mixture_weight(first.log(), second.log()).item() == pytest.approx(float(grid[values.argmax()]), abs=2e-3)
    assert mixture_weight(torch.zeros(0), torch.zeros(0)).item() == 0.5
    assert mixture_weight(torch.full((98,), -1.0), torch.full((98,), -90.0)).item() == pytest.approx(0.99)
