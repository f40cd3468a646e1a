"""Who is drawn for a round."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest

from fedlabel.seeding import numpy_generator
from fedlabel.server_config import SamplingConfig
from server.sampling import (
    History,
    Pool,
    by_size,
    label_kinds,
    least_available,
    oort,
    oort_utility,
    power_of_choice,
    sampler_of,
    uniform,
)


def rng(number: int = 0) -> np.random.Generator:
    return numpy_generator(0, "cohort", number)


def shares(pool: Pool, draw: object, size: int, rounds: int = 2000) -> np.ndarray:
    """Returns how often each client is drawn, per round."""
    drawn = [client for number in range(rounds) for client in draw(pool, size, rng(number))]  # type: ignore[operator]
    return np.bincount(drawn, minlength=pool.num_clients) / rounds


def history(**losses: tuple[float, float, int, float]) -> History:
    """Returns what is remembered; by "cN": loss, samples, last round, seconds."""
    found = History()
    for name, (loss, samples, last, seconds) in losses.items():
        found.see(int(name[1:]), last, (loss * samples, samples), seconds)
    return found


EMPTY = History()
KINDS = ("uniform", "size", "least_available", "power_of_choice", "oort", "label_kinds")


def full(**options: object) -> Pool:
    """Ten clients, about whom everything is known."""
    seen = history(**{f"c{number}": (1.0 + number, 10.0, 1 + number % 3, 1.0 + number) for number in range(5)})
    known: dict[str, object] = {
        "sizes": lambda: np.arange(10),
        "kinds": lambda: np.eye(3, dtype=int)[np.arange(10) % 3],
        "availability": lambda clients: clients / 10,
        **options,
    }
    return Pool(10, seen, **known)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_draws_others_than_the_excluded_sorted_and_once(kind: str) -> None:
    draw = sampler_of(SamplingConfig(kind))
    excluded = frozenset([1, 4, 8])
    for number in range(20):
        for pool in (full(excluded=excluded), full(excluded=excluded, connected=np.arange(7))):
            drawn = draw(pool, 3, rng(number))
            assert drawn == sorted(set(drawn))
            assert len(drawn) == 3
            assert not excluded & set(drawn)
            assert pool.connected is None or max(drawn) < 7
            assert draw(pool, 3, rng(number)) == drawn
            assert all(type(client) is int for client in drawn)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_draws_all_that_are_left_if_they_are_too_few(kind: str) -> None:
    draw = sampler_of(SamplingConfig(kind))
    assert draw(full(excluded=frozenset(range(8))), 5, rng()) == [8, 9]
    assert draw(full(excluded=frozenset(range(10))), 5, rng()) == []
    assert draw(full(connected=np.array([0, 9])), 5, rng()) == [0, 9]


def test_uniform_is_a_function_of_seed_and_round() -> None:
    pool = Pool(50, EMPTY)
    assert uniform(pool, 10, rng(3)) == uniform(pool, 10, rng(3))
    assert uniform(pool, 10, rng(3)) != uniform(pool, 10, rng(4))
    assert uniform(Pool(5, EMPTY), 5, rng()) == [0, 1, 2, 3, 4]
    drawn = shares(Pool(10, EMPTY), uniform, 3)
    assert drawn.min() > 0.275  # 0.3 expected, sd .01
    assert drawn.max() < 0.325


def test_uniform_stays_uniform_without_the_excluded() -> None:
    drawn = shares(Pool(10, EMPTY, frozenset([2, 3])), uniform, 3)
    others = np.delete(drawn, [2, 3])
    assert drawn[[2, 3]].tolist() == [0, 0]
    assert others.min() > 0.345  # 0.375 expected
    assert others.max() < 0.405


def test_uniform_costs_what_the_cohort_costs() -> None:
    """Whatever the number of registered clients."""
    tracemalloc.start()
    try:
        cohort = uniform(Pool(10**9, EMPTY), 50, rng())
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()
    assert len(set(cohort)) == 50


def test_by_size_draws_in_proportion() -> None:
    drawn = shares(Pool(4, EMPTY, sizes=lambda: np.array([1, 2, 7, 0])), by_size, 1)
    assert drawn == pytest.approx([0.1, 0.2, 0.7, 0], abs=0.03)


def test_clients_without_samples_come_last() -> None:
    pool = Pool(4, EMPTY, sizes=lambda: np.array([1, 0, 7, 0]))
    assert by_size(pool, 2, rng()) == [0, 2]
    assert {0, 2} < set(by_size(pool, 3, rng()))


def test_least_available_first() -> None:
    pool = Pool(5, EMPTY, availability=lambda clients: np.array([0.9, 0.1, 0.5, 0.1, 0.2])[clients])
    assert least_available(pool, 3, rng()) == [1, 3, 4]
    assert set(least_available(pool, 1, rng(5))) <= {1, 3}


def test_power_of_choice_takes_the_largest_loss_and_strangers_first() -> None:
    seen = history(c0=(0.5, 1, 1, 1), c1=(2.0, 1, 1, 1), c2=(1.0, 1, 1, 1))
    pool = Pool(4, seen, sizes=lambda: np.ones(4))
    assert power_of_choice(pool, 2, rng(), candidates=4) == [1, 3]
    assert power_of_choice(pool, 3, rng(), candidates=4) == [1, 2, 3]


def test_oort_utility_by_hand() -> None:
    """Round 3 is next. Client 0: 10 * 2 = 20 of at most 20, plus sqrt(.1 log 3 / 2); client 1: 10 / 20, plus
    sqrt(.1 log 3 / 1), and it took 8 s, twice the median of 4: a quarter of that with exponent 2.
    """
    seen = history(c0=(2.0, 10, 2, 2.0), c1=(1.0, 10, 1, 8.0), c2=(0.1, 1, 2, 4.0))
    found = oort_utility(seen, np.array([0, 1]), penalty=2.0)
    bonus = 0.1 * math.log(3)
    assert found == pytest.approx([1 + math.sqrt(bonus / 2), (0.5 + math.sqrt(bonus)) / 4])
    without = oort_utility(seen, np.array([0, 1]), penalty=0.0)
    assert without == pytest.approx([1 + math.sqrt(bonus / 2), 0.5 + math.sqrt(bonus)])


def test_oort_explores_a_share_and_prefers_useful_clients() -> None:
    seen = history(c0=(2.0, 10, 1, 1.0), c1=(1.9, 10, 1, 1.0), c2=(0.01, 1, 1, 1.0), c3=(2.0, 10, 1, 90.0))
    pool = Pool(6, seen)
    for number in range(10):
        drawn = oort(pool, 3, rng(number), exploration=0.3)
        assert set(drawn) - {4, 5} <= {0, 1}
        assert len(set(drawn) & {4, 5}) == 1
    assert oort(Pool(6, EMPTY), 3, rng()) == oort(Pool(6, EMPTY), 3, rng())


def test_label_kinds_have_their_turn_equally_often() -> None:
    """Two clients of 20 hold bags, 18 labels: of four drawn two hold bags, where a uniform draw has 0.4 of them."""
    kinds = np.zeros((20, 2), int)
    kinds[:, 0] = 1
    kinds[[3, 11]] = [0, 5]
    pool = Pool(20, EMPTY, kinds=lambda: kinds)
    drawn = [label_kinds(pool, 4, rng(number)) for number in range(200)]
    assert all(len({3, 11} & set(each)) == 2 for each in drawn)
    others = np.bincount([client for each in drawn for client in each], minlength=20)[[0, 19]]
    assert others.min() > 10  # 22 expected


def test_history_goes_on_from_its_saved_state() -> None:
    seen = history(c3=(0.5, 4, 2, 1.5))
    seen.see(1, 3, (0.0, 0.0), None)
    again = History.load(seen.dump())
    assert again == seen
    assert again.seconds == {3: 1.5}
    assert again.round == {1: 3, 3: 2}
