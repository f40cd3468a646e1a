"""Who looks at a run: in a simulation those that know the truth, too; elsewhere none of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from server.observers import EVERYWHERE, TRUTH, Report, observers_of
from server.observers.noise import NoiseObserver
from server.observers.training import SystemObserver


def experiment(figures: bool = True) -> Any:
    evaluation = SimpleNamespace(every=2)
    return SimpleNamespace(
        config=SimpleNamespace(
            num_clients=3,
            num_rounds=30,
            supervision=SimpleNamespace(parts=[]),
            privacy=SimpleNamespace(is_on=False),
            evaluation=evaluation,
            draws_figures=figures,
        )
    )


def test_real_clients_have_no_observer_of_the_truth() -> None:
    made = observers_of(experiment(), {}, simulated=False)
    assert {name: type(each) for name, each in made.items()} == {**EVERYWHERE, "system": SystemObserver}
    assert not {type(each) for each in made.values()} & set(TRUTH.values())
    assert type(made["noise"]) is NoiseObserver  # not its subclass, which knows the truth


def test_simulated_ones_have_all_and_the_systems_is_the_last() -> None:
    made = observers_of(experiment(), {}, simulated=True)
    assert {type(each) for each in made.values()} >= set(TRUTH.values())
    assert set(made) == {*EVERYWHERE, *TRUTH, "system"}
    assert list(made)[-1] == "system"  # it says how long the round took


@pytest.mark.parametrize("simulated", [False, True])
def test_what_was_remembered_is_put_back(simulated: bool) -> None:
    votes = {2: {"function_samples": [3.0, 1.0, 3.0, 1.0, 1.0]}}
    made = observers_of(experiment(), {"functions": votes}, simulated)
    assert made["functions"].dump() == votes
    assert {name: each.dump() for name, each in made.items() if each.dump()} == {"functions": votes}
    assert not any(each.dump() for each in observers_of(experiment(), {}, simulated).values())


def test_reports_are_put_together_field_by_field() -> None:
    first = Report({"a": 1.0}, texts={"t": "x"}, files={"f": "1"})
    both = first.add(Report({"b": 2.0}, files={"g": "2"}))
    assert both == Report({"a": 1.0, "b": 2.0}, texts={"t": "x"}, files={"f": "1", "g": "2"})
    assert first == Report({"a": 1.0}, texts={"t": "x"}, files={"f": "1"})


def test_figures_come_every_ten_evaluations_and_at_the_end() -> None:
    """Of 30 rounds, evaluated in every second."""
    for figures, shown in ((True, [20, 30]), (False, [])):
        observer = observers_of(experiment(figures), {}, simulated=False)["evaluation"]
        assert [number for number in range(1, 31) if observer.has_figures(number)] == shown
    assert [number for number in range(1, 31) if observer.is_last(number)] == [30]
