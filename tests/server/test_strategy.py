"""The adapter to Flower's strategies: arithmetic of the mean, cohorts, memory between rounds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NoReturn

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import FedAdam, Strategy
from flwr.supercore.task_identity import TaskIdentity

from fedlabel.cohort import ClientResult
from fedlabel.config import ConfigError
from fedlabel.methods.batch import StateDict
from fedlabel.methods.uploads import ModelPart
from fedlabel.server_config import StrategyConfig
from server.blocks import BlockResult
from server.strategy import (
    CannotCombine,
    WeightedMean,
    begin_round,
    build_strategy,
    check_cohort,
    combine,
    reply_bounds,
    restore_strategy,
    strategy_names,
    strategy_state,
)


def model(**arrays: float | np.ndarray) -> StateDict:
    return {name: torch.as_tensor(np.asarray(value, np.float32)) for name, value in arrays.items()}


def result(weight: float, state: StateDict, loss: float = 1.0) -> ClientResult:
    return ClientResult(0, {"model": ModelPart(state, weight)}, {"train/loss": [loss, 1.0]}, {}, {}, {})


def combined(strategy: Strategy, results: Sequence[ClientResult], number: int = 1) -> StateDict | None:
    """Returns what a strategy makes of results, each in a block of its own."""
    (like, _), *_ = results[0].parts.values()
    return combine(strategy, number, [BlockResult([each], [], None) for each in results], like)


def mean(results: Sequence[ClientResult]) -> float:
    found = combined(WeightedMean(), results)
    assert found is not None
    return float(found["w"])


def test_check_9_paper_merge() -> None:
    """w = 0, (dL, dU, r) = (1, .5, 30), (3, -1, 10): .75 * 1.5 + .25 * 2 = 1.625, in any order, for any scale of r."""
    first, second = result(30.0, model(w=1.5)), result(10.0, model(w=2.0))
    assert mean([first, second]) == mean([second, first]) == 1.625
    scaled = [result(0.3, model(w=1.5)), result(0.1, model(w=2.0))]
    assert mean(scaled) == pytest.approx(1.625, rel=1e-7)


def test_check_9_released_merge() -> None:
    """w_L uniform, w_U weighted 3:1, halved: .5 * (1 + 3) / 2 + .5 * (.75 * .5 - .25 * 1) = 1.0625."""

    def parts(supervised: float, unlabeled: float, kept: float) -> ClientResult:
        both = {"supervised": ModelPart(model(w=supervised), 1.0), "unlabeled": ModelPart(model(w=unlabeled), kept)}
        return result(1.0, {})._replace(parts=both)

    assert mean([parts(1.0, 0.5, 3.0), parts(3.0, -1.0, 1.0)]) == 1.0625


def test_one_client_is_returned_to_the_bit() -> None:
    value = np.float32(0.1)
    assert np.float32(mean([result(7.0, model(w=value))])) == value


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("weighted_mean", (70, 70, 70), 70),  # in floats (7 + 14 + 21) / .6 = 69.99999999999999
        ("FedAvg", (70, 70, 70), 70),
        ("weighted_mean", (-3, -4, -4), -4),  # -3.83
        ("FedAvg", (1, 2, 2), 2),  # 1.83
        ("FedMedian", (1, 2, 5), 2),
    ],
)
def test_integer_buffers_are_rounded_and_stay_integers(name: str, values: tuple[int, ...], expected: int) -> None:
    """With weights .1, .2 and .3; a mean that is cut would be one short."""
    copies = [
        result(weight, {**model(w=1.0), "seen": torch.tensor(value), "used": torch.tensor([True, value > 1])})
        for value, weight in zip(values, (0.1, 0.2, 0.3), strict=True)
    ]
    found = combined(build_strategy(StrategyConfig(name)), copies)
    assert found is not None
    seen, used = found["seen"], found["used"]
    assert (seen.dtype, used.dtype) == (torch.int64, torch.bool)
    assert int(seen) == expected
    assert used.tolist() == [True, expected > 1]


def test_no_weight_keeps_the_global_model() -> None:
    idle = [result(0.0, model(w=1.0))]
    assert combined(WeightedMean(), idle) is None
    assert combined(build_strategy(StrategyConfig("FedMedian")), idle) is None
    assert combine(WeightedMean(), 1, [], model(w=1.0)) is None


def test_sums_are_in_double_precision() -> None:
    """10,001 values of 1e8 and 1 in turn: single precision would lose the ones."""
    values = [result(1.0, model(w=1e8 if i % 2 else 1.0)) for i in range(1001)]
    assert mean(values) == pytest.approx((500 * 1e8 + 501) / 1001, rel=1e-7)


FIVE = [result(1.0, model(w=float(v))) for v in (1, 2, 3, 4, 100)]


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("FedAvg", {}, 22.0),
        ("FedMedian", {}, 3.0),
        ("FedTrimmedAvg", {"beta": 0.2}, 3.0),  # mean of 2, 3, 4
        ("Krum", {"num_malicious_nodes": 1}, 2.0),  # closest to its two neighbours; first of equals
    ],
)
def test_flower_strategies_by_name(name: str, args: dict[str, float], expected: float) -> None:
    found = combined(build_strategy(StrategyConfig(name, args)), FIVE)
    assert found is not None
    assert float(found["w"]) == pytest.approx(expected)


def test_krum_sees_small_updates_of_large_weights() -> None:
    """Weights of 100, updates of .01: |x|^2 is 1e8 times |x - y|^2, which is lost in single precision. The fourth of
    five clients is in the middle of the four honest ones."""
    places = [(0.01, 0.0), (-0.01, 0.0), (0.0, 0.01), (0.0, 0.001), (0.5, 0.5)]
    results = [result(1.0, model(w=np.concatenate([np.full(5000, 100.0), np.add(100.0, place)]))) for place in places]
    found = combined(build_strategy(StrategyConfig("Krum", {"num_malicious_nodes": 1})), results)
    assert found is not None
    assert found["w"].dtype == torch.float32
    assert torch.equal(found["w"], results[3].parts["model"].state["w"])


@pytest.mark.parametrize(
    ("name", "args", "cohort", "reason"),
    [
        ("FedTrimmedAvg", {"beta": 0.2}, 4, "of a cohort of 4 clients is less than one, .* take at least 0.25"),
        ("Krum", {"num_malicious_nodes": 2}, 6, r"`strategy.args.num_malicious_nodes` \(=2\) needs .* at least 7"),
        ("MultiKrum", {"num_malicious_nodes": 2}, 6, "cohorts of at least 7 clients with MultiKrum"),
        ("Bulyan", {"num_malicious_nodes": 2}, 10, "cohorts of at least 11 clients with Bulyan"),
    ],
)
def test_cohorts_too_small_for_a_robust_strategy_are_refused(
    name: str, args: dict[str, float], cohort: int, reason: str
) -> None:
    config = StrategyConfig(name, args)
    check_cohort(config, cohort + 1)
    with pytest.raises(ConfigError, match=reason):
        check_cohort(config, cohort)


def test_every_listed_strategy_aggregates_finite_weights() -> None:
    args = {"QFedAvg": {"client_learning_rate": 0.1}}
    for name in strategy_names():
        strategy = build_strategy(StrategyConfig(name, args.get(name, {})))
        begin_round(strategy, 1, model(w=0.5), range(5))
        found = combined(strategy, FIVE)
        assert found is not None, name
        assert math.isfinite(float(found["w"])), name


@pytest.mark.parametrize("rate", [1e-6, 0.1, 1e6])
@pytest.mark.parametrize("q", [0.0, 0.1, 1.0, 10 / 3, 5.0, 10.0])
def test_qfedavg_gives_numbers_whatever_one_client_sends(
    q: float, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and losses at the ends of what is taken, of one client of two."""
    monkeypatch.setattr("gc.collect", lambda: 0)  # Flower's strategy calls it for every reply: a second a round
    config = StrategyConfig("QFedAvg", {"q": q, "client_learning_rate": rate})
    bounds = reply_bounds(config)
    assert bounds.largest_loss == pytest.approx(min(1e6, 1e20 ** (1 / q)) if q else 1e6)
    for weight, loss in itertools.product((bounds.weight, 0.1, 0.0), (bounds.largest_loss, 0.0)):
        strategy = build_strategy(config)
        begin_round(strategy, 1, model(w=np.full(1000, -bounds.weight)), [0, 1])
        found = combined(
            strategy,
            [result(1.0, model(w=np.full(1000, value)), own) for value, own in ((weight, loss), (0.1, 2.3))],
        )
        assert found is not None
        assert found["w"].isfinite().all(), (weight, loss)


def test_memory_of_a_strategy_survives_a_checkpoint() -> None:
    """FedAdam's second round depends on its first; a restored strategy gives the same third value."""

    def round_of(strategy: FedAdam, number: int, start: float) -> float:
        begin_round(strategy, number, model(w=start), [0])
        found = combined(strategy, [result(1.0, model(w=start + 1))], number)
        assert found is not None
        return float(found["w"])

    first = build_strategy(StrategyConfig("FedAdam"))
    value = round_of(first, 1, 0.0)  # type: ignore[arg-type]
    second = build_strategy(StrategyConfig("FedAdam"))
    restore_strategy(second, strategy_state(first))
    fresh = build_strategy(StrategyConfig("FedAdam"))
    expected = round_of(first, 2, value)  # type: ignore[arg-type]
    assert round_of(second, 2, value) == expected  # type: ignore[arg-type]
    assert round_of(fresh, 2, value) != expected  # type: ignore[arg-type]


def test_strategy_errors_name_key_and_choices() -> None:
    with pytest.raises(ConfigError, match=r"`strategy.name` \(=FedAdams\) must be one of weighted_mean, .*FedAdam"):
        build_strategy(StrategyConfig("FedAdams"))
    with pytest.raises(ConfigError, match="FedProx is a term of the local loss: set training.prox_mu"):
        build_strategy(StrategyConfig("FedProx"))
    with pytest.raises(ConfigError, match="Differential privacy is not a strategy here: set privacy.kind=server"):
        build_strategy(StrategyConfig("DifferentialPrivacyServerSideFixedClipping"))
    with pytest.raises(ConfigError, match="has weighted_by_key, which FedAdam does not take"):
        build_strategy(StrategyConfig("FedAdam", {"weighted_by_key": "x"}))
    with pytest.raises(ConfigError, match="has etaa, which FedAdam does not take; allowed: .*eta"):
        build_strategy(StrategyConfig("FedAdam", {"etaa": 1}))
    with pytest.raises(ConfigError, match=r"`strategy.args.beta` \(=0.9\) must be a number in \[0, 0.5\)"):
        build_strategy(StrategyConfig("FedTrimmedAvg", {"beta": 0.9}))
    with pytest.raises(
        ConfigError, match=r"needs strategy.args.client_learning_rate: a number in \[0.000001, 1000000\]"
    ):
        build_strategy(StrategyConfig("QFedAvg"))
    for key, value in (("q", 10.1), ("q", -1), ("client_learning_rate", 1e-7), ("client_learning_rate", 1e7)):
        with pytest.raises(ConfigError, match=rf"`strategy.args.{key}` \(=.*\) must be a number in \["):
            build_strategy(StrategyConfig("QFedAvg", {"client_learning_rate": 1, key: value}))
    for value in ("fast", True, 0, float("nan"), float("inf"), None, [1]):
        with pytest.raises(ConfigError, match=r"`strategy.args.eta` \(=.*\) must be a positive number"):
            build_strategy(StrategyConfig("FedAdam", {"eta": value}))
    with pytest.raises(ConfigError, match=r"`strategy.args.num_malicious_nodes` \(=1.5\) must be a whole number"):
        build_strategy(StrategyConfig("Krum", {"num_malicious_nodes": 1.5}))


def test_every_argument_that_a_strategy_takes_is_checked() -> None:
    """None can be given of which nothing is known, whatever a later Flower adds."""
    for name in strategy_names()[1:]:
        with pytest.raises(ConfigError, match="which .* does not take; allowed: (.*)") as caught:
            build_strategy(StrategyConfig(name, {"no_such": 1}))
        allowed = str(caught.value).partition("allowed: ")[2].rstrip(".").split(", ")
        for argument in allowed if allowed != ["nothing"] else []:
            with pytest.raises(ConfigError, match=rf"`strategy.args.{argument}` \(=x\) must be a"):
                build_strategy(StrategyConfig(name, {argument: "x"}))


def test_where_a_strategy_failed_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(FedAdam):
        def aggregate_train(self, *_: object) -> NoReturn:
            raise IndexError("of a bug")

    with caplog.at_level("DEBUG", "fedlabel"), pytest.raises(CannotCombine, match=r"\(IndexError: of a bug\)"):
        combined(Broken(), [result(1.0, model(w=1.0))])
    assert 'raise IndexError("of a bug")' in caplog.text


def test_momentum_starts_from_the_model_that_was_sent_even_if_the_server_trained_it() -> None:
    """FedAvgM, rate 1, momentum .5: w' = mean - .5 v, v' = .5 v + (w - mean).

    Round 1: w = 0, mean 1: v = -1, w = 1. The server trains w to 3. Round 2: mean 5: v = -.5 + (3 - 5) = -2.5,
    w = 5.5. The server trains w to 6. Round 3: mean 6: v = -1.25, w = 7.25. From the models FedAvgM made itself it
    would be v = -.5 + (1 - 5) = -4.5 in round 2 and w = 8.25 in round 3.
    """
    strategy = build_strategy(StrategyConfig("FedAvgM", {"server_learning_rate": 1.0, "server_momentum": 0.5}))

    def one_round(number: int, sent: float, returned: float) -> float:
        begin_round(strategy, number, model(w=sent), [0])
        found = combined(strategy, [result(1.0, model(w=returned))], number)
        assert found is not None
        return float(found["w"])

    assert one_round(1, 0.0, 1.0) == 1.0
    assert one_round(2, 3.0, 5.0) == 5.5
    assert one_round(3, 6.0, 6.0) == 7.25


def test_flowers_strategies_work_in_a_process_without_a_superlink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only Flower's processes have the identity that its messages read."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, None)
    begin_round(build_strategy(StrategyConfig("FedAdam")), 1, {"w": torch.zeros(2)}, [0, 3])
