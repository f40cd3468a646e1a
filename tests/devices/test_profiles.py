"""Populations: how many have which profile, how factors are distributed, and who holds rare classes."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest

from fedlabel.devices.profiles import PRESETS, assign, lognormal_factors, shares_of, zipf_factors
from tests.devices.populations import MIXED, devices


def ranks(values: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.argsort(np.argsort(values))
    return found


def correlation(correlation: float, seed: int = 0, count: int = 4000) -> float:
    """Returns the rank correlation of slowness and rarity, without ties."""
    rng = np.random.default_rng(7)
    speed, rarity = rng.random(count), rng.random(count)
    device = assign(speed, rarity, correlation, seed)
    assert sorted(device.tolist()) == list(range(count))
    return float(np.corrcoef(ranks(-speed[device]), ranks(rarity))[0, 1])


def test_presets_are_in_order_and_possible() -> None:
    assert list(PRESETS) == ["phone", "laptop", "edge_box", "hospital_server"]
    rising = np.array(list(PRESETS.values()))
    assert (np.diff(rising, axis=0) >= 0).all()
    assert (rising > 0).all()
    assert (rising[:, 5] <= 1).all()
    assert (rising[:, 1] == rising[:, 0] / 2).all()


@pytest.mark.parametrize("count", [1, 3, 10, 997])
def test_parts_have_their_shares_to_within_one(count: int) -> None:
    shares = np.array([0.5, 0.3, 0.2])
    part = shares_of(shares.tolist(), count)
    assert len(part) == count
    assert (abs(np.bincount(part, minlength=3) - shares * count) < 1).all()


def test_log_normal_factors() -> None:
    log = np.log(lognormal_factors(0.7, 20_000, 3))
    assert np.median(log) == pytest.approx(0, abs=0.02)
    assert log.std() == pytest.approx(0.7, rel=0.02)
    assert (lognormal_factors(0.7, 20_000, 4) != np.exp(log)).any()


def test_zipf_factors() -> None:
    factor = zipf_factors(1.5, 100, 0)
    assert np.sort(factor)[::-1] == pytest.approx(np.arange(1, 101) ** -1.5)
    assert (np.diff(factor) > 0).any()  # in random order


@pytest.mark.parametrize("kind", ["lognormal", "zipf"])
def test_a_factor_is_of_all_speeds(kind: str) -> None:
    found, phone = devices(20, kind=kind), PRESETS["phone"]
    for client in range(20):
        profile = found.profile(client)
        factor = profile.forward / phone.forward
        assert profile[:4] == pytest.approx([factor * speed for speed in phone[:4]])
        assert profile[4:] == phone[4:]
    assert len(set(found.speed(np.arange(20)).tolist())) == 20


def test_which_client_has_which_device_is_drawn_from_the_seed() -> None:
    everyone = np.arange(200)
    first, again, other = (devices(200, seed, population=MIXED).speed(everyone) for seed in (0, 0, 1))
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()
    assert np.sort(first).tolist() == np.sort(other).tolist()
    assert first.tolist() != np.sort(first).tolist()


@pytest.mark.parametrize("wanted", [-0.9, -0.5, 0.3, 0.8])
def test_rank_correlation_is_the_one_that_was_asked_for(wanted: float) -> None:
    assert correlation(wanted) == pytest.approx(wanted, abs=0.03)


def test_no_correlation_is_independence() -> None:
    assert abs(correlation(0.0)) < 0.03
    assert devices(50, kind="lognormal").speed(np.arange(50)).shape == (50,)  # needs no rarity


def test_the_extremes_are_exact() -> None:
    for wanted in (-1.0, 1.0):
        assert all(correlation(wanted, seed, 500) == pytest.approx(wanted, abs=1e-12) for seed in range(5))


def test_the_extremes_are_exact_where_neighbours_are_near() -> None:
    rarity = np.random.default_rng(0).random(200_000)
    device = assign(np.arange(200_000.0), rarity, 1.0, 0)
    assert (np.diff(device[np.argsort(rarity)]) == -1).all()


def test_more_correlation_is_more() -> None:
    found = [correlation(wanted) for wanted in np.linspace(-1, 1, 11).tolist()]
    assert (np.diff(found) > 0.1).all()


def test_ties_are_broken_at_random() -> None:
    """Two profiles, and half of the clients without a rare sample: the slow half goes to the others, in any order."""
    speed, rarity = np.repeat([1.0, 5.0], 50), np.tile([0.0, 0.5], 50)
    orders = set()
    for seed in range(3):
        device = assign(speed, rarity, 1.0, seed)
        assert (speed[device] == np.where(rarity > 0, 1.0, 5.0)).all()
        orders.add(tuple(device.tolist()))
    assert len(orders) == 3


def test_a_correlation_changes_who_has_a_device_not_which_there_are() -> None:
    everyone, rarity = np.arange(300), np.random.default_rng(0).random(300)
    free = devices(300, kind="lognormal", population=MIXED)
    bound = devices(300, rarity=rarity, kind="lognormal", population=MIXED, correlation=1.0)
    assert np.sort(free.speed(everyone)).tolist() == np.sort(bound.speed(everyone)).tolist()
    assert (np.diff(bound.speed(everyone)[np.argsort(rarity)]) < 0).all()
    assert math.isfinite(bound.speed(everyone).sum())


def test_the_table_in_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "devices.md").read_text()
    rows = re.findall(
        r"^\| `(\w+)` \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.M
    )
    scale = np.array([1, 1, 1e6, 1e6, 1e9, 1])
    written = {name: (np.array([float(cell.replace(",", "")) for cell in cells]) * scale) for name, *cells in rows}
    assert {name: tuple(numbers.tolist()) for name, numbers in written.items()} == dict(PRESETS)
