"""How long work takes, and who is there: numbers worked out by hand, and laws that hold for any."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedlabel.devices.clock import Devices, Work
from fedlabel.devices.config import PopulationPart
from fedlabel.devices.machines import ProfiledMachines
from fedlabel.devices.profiles import Profile
from tests.devices.populations import MIXED, PHONES, devices

ALWAYS = {"population": PHONES, "available": 1.0}
WORK = Work(forward=600, backward=300, bytes_down=12.5e6, bytes_up=2.5e6)
"""A phone receives 6.25e6 bytes per second and sends 1.25e6; it does 300 samples per second forward, 150 backward: so
2 seconds, 2 + 2 seconds, 2 seconds."""


def there(phase: float, share: float = 0.25, period: float = 100.0) -> Devices:
    """Returns one client with 10 samples and bytes per second, available for 25 of 100 seconds."""
    profile = Profile(10, 5, 10, 10, 1e9, share)
    machines = ProfiledMachines([profile], ["x"], np.array([0]), np.array([1.0]), period, np.array([phase]))
    return Devices(machines, 1, (0, 0, 0), 0)


def test_seconds_of_a_phone() -> None:
    found = devices(**ALWAYS)
    assert found.seconds(0, WORK) == (2, 4, 2)
    assert found.seconds(0, WORK, start=1e6) == (2, 4, 2)
    assert found.seconds(0, WORK).total == 8
    assert found.finish(0, 5.0, WORK) == 13
    assert found.least(0, 5.0, WORK.bytes_down, WORK.bytes_up) == 9
    assert found.stays(0, 5.0) == math.inf


def test_numbers_of_a_part_replace_its_profile_s() -> None:
    part = PopulationPart("phone", forward=30, down=1e6, up=1e5, memory=5e8)
    found = devices(population=(part,), available=1.0)
    assert found.seconds(0, Work(60, 30, 1e6, 1e5)) == (1, 4, 1)
    assert found.fits(np.array([0]), 5e8).tolist() == [True]
    assert found.fits(np.array([0]), 5e8 + 1).tolist() == [False]


def test_a_window_of_availability() -> None:
    """From 30 to 55, from 130 to 155, and so on, half open."""
    found, everyone = there(30), np.array([0])
    times = {29.9: False, 30.0: True, 54.9: True, 55.0: False, 129.0: False, 130.0: True, 155.0: False}
    assert {time: bool(found.is_available(everyone, time)[0]) for time in times} == times
    assert [found.stays(0, time) for time in (29.9, 30.0, 50.0, 55.0)] == [0, 25, 5, 0]
    assert [found.next_available(everyone, time) for time in (0.0, 30.0, 40.0, 55.0)] == [30, 30, 40, 130]
    assert found.next_available(everyone[:0], 0.0) == math.inf


def test_a_window_goes_on_over_the_start_of_the_run() -> None:
    found = there(90)  # from -10 to 15
    assert found.is_available(np.array([0]), 0.0)[0]
    assert found.stays(0, 0.0) == 15


def test_a_reply_arrives_within_the_window_or_never() -> None:
    """10 bytes, 50 + 50 samples and 10 bytes last 1 + 15 + 1 seconds; the window ends at 55."""
    found, work = there(30), Work(50, 50, 10, 10)
    assert found.finish(0, 30.0, work) == 47
    assert found.finish(0, 38.0, work) == 55
    assert found.finish(0, 38.1, work) == math.inf
    assert found.finish(0, 29.0, work) == math.inf
    assert found.least(0, 53.0, 10, 10) == 55
    assert found.least(0, 53.1, 10, 10) == math.inf


@pytest.mark.parametrize("period", [1.1, 3600.0, 86_400.0])
def test_whoever_comes_is_there_when_it_comes(period: float) -> None:
    """Whatever rounding does to the time of it: else a simulation that waits for it would wait for ever."""
    found, rng = devices(50, available=0.001, period=period), np.random.default_rng(0)
    for time in (rng.random(300) * period * 10.0 ** rng.integers(0, 6, 300)).tolist():
        clients = rng.choice(50, 3, replace=False)
        then = found.next_available(clients, time)
        assert then >= time
        assert found.is_available(clients, then).any()
        before = np.nextafter(then, -math.inf)
        assert before < time or not found.is_available(clients, float(before)).any()


@pytest.mark.parametrize("kind", ["preset", "lognormal", "zipf"])
def test_no_reply_is_earlier_than_its_lower_bound(kind: str) -> None:
    found, rng = devices(40, kind=kind, population=MIXED), np.random.default_rng(1)
    finite = 0
    for _ in range(500):
        client, start = int(rng.integers(40)), float(rng.random() * 1e5)
        down, up, forward, backward = (10 ** rng.uniform(0, [6, 6, 4, 4])).tolist()
        least = found.least(client, start, down, up)
        finish = found.finish(client, start, Work(forward, backward, down, up))
        assert finish >= least >= start
        assert found.finish(client, start, Work(forward, 0, down, up)) <= finish
        finite += finish < math.inf
    assert 150 < finite < 450


def test_clients_are_asked_alone_or_together() -> None:
    found, clients = devices(30, population=MIXED), np.array([7, 3, 21])
    for time in (0.0, 4e4, 3e5):
        assert found.is_available(clients, time).tolist() == [found.stays(c, time) > 0 for c in clients.tolist()]
        alone = [found.next_available(np.array([client]), time) for client in clients]
        assert found.next_available(clients, time) == min(alone)
    assert found.speed(clients).tolist() == [found.profile(client).forward for client in clients.tolist()]


def test_about_the_share_of_the_clients_is_there() -> None:
    found = devices(10_000, available=0.3)
    for time in (0.0, 30_000.0, 1e6):
        assert found.is_available(np.arange(10_000), time).mean() == pytest.approx(0.3, abs=0.015)  # 3 sd


def test_who_drops_out() -> None:
    clients = np.arange(20_000)
    found = devices(20_000, dropout_before=0.1, dropout_during=0.2, dropout_after=0.3)
    dropped = found.dropouts(3, clients)
    counts = [list(dropped.values()).count(when) / 20_000 for when in ("before", "during", "after")]
    assert counts == pytest.approx([0.1, 0.2, 0.3], abs=0.01)  # 3 sd
    assert found.dropouts(4, clients) != dropped
    assert found.dropouts(3, clients) == dropped
    some = clients[::-7]
    assert found.dropouts(3, some) == {c: dropped[c] for c in some.tolist() if c in dropped}
    other = devices(20_000, seed=1, dropout_before=0.1, dropout_during=0.2, dropout_after=0.3)
    assert other.dropouts(3, clients) != dropped


def test_all_or_nobody_drops_out() -> None:
    clients = np.arange(100)
    assert devices(100).dropouts(1, clients) == {}
    assert set(devices(100, dropout_during=1.0).dropouts(1, clients).values()) == {"during"}
    everyone = devices(100, dropout_before=0.5, dropout_after=0.5).dropouts(1, clients)
    assert len(everyone) == 100
    assert set(everyone.values()) == {"before", "after"}


def test_summary() -> None:
    assert devices(10, population=MIXED).summary() == {
        "profiles": {"phone": 5, "laptop": 3, "hospital_server": 2},
        "speed": {"q0": 300, "q10": 300, "q50": 900, "q90": 40_000, "q100": 40_000},
    }


def test_memory_decides_who_fits() -> None:
    found, everyone = devices(10, population=MIXED), np.arange(10)
    assert found.fits(everyone, 2e9).tolist() == (found.speed(everyone) > 300).tolist()
    assert found.fits(everyone, 1.5e9).all()
    assert not found.fits(everyone, 1e12).any()


def test_a_million_clients_are_arrays() -> None:
    everyone = np.arange(1_000_000)
    rarity = np.random.default_rng(0).random(1_000_000)
    found = devices(1_000_000, rarity=rarity, kind="lognormal", population=MIXED, correlation=0.5)
    assert found.is_available(everyone, 1e4).shape == (1_000_000,)
    held = [value for value in vars(found._machines).values() if isinstance(value, np.ndarray)]
    assert sum(value.nbytes for value in held) < 30e6
    assert math.isfinite(found.next_available(everyone[:3], 1e4))
