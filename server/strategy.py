"""The only adapter between methods and Flower's strategies: cohorts, and the combination of results."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import flwr.serverapp.strategy as flower_strategies
import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord
from flwr.serverapp import Grid
from flwr.serverapp.exception import AppExitException
from flwr.serverapp.strategy import Bulyan, FedAvg, FedAvgM, FedTrimmedAvg, MultiKrum, Strategy
from torch import Tensor

from fedlabel.cohort import ClientResult
from fedlabel.config import ConfigError
from fedlabel.config_schema import LARGEST
from fedlabel.config_text import as_yaml
from fedlabel.methods.batch import StateDict
from fedlabel.methods.uploads import ModelPart
from fedlabel.metric_tags import LARGEST_MEAN
from fedlabel.names import did_you_mean
from fedlabel.server_config import StrategyConfig
from server.blocks import BlockResult, WeightedSum
from server.flower import as_record, as_reply, set_identity

logger = logging.getLogger("fedlabel")


class CannotCombine(ValueError):
    """A strategy cannot aggregate the replies of a round."""


class WeightedMean(FedAvg):
    """FedAvg's weighted mean, which the server computes itself from the sums of blocks (see `server/blocks.py`).

    A result may hold several models (see `Upload.send`), each with a weight: each part is averaged by its own weights;
    the result is the plain mean of the parts.
    """


def strategy_names() -> list[str]:
    """Returns the names that `strategy.name` may have."""
    return ["weighted_mean", *sorted(_flower_strategies())]


LARGEST_WEIGHT = 1e12
"""Of a model: the sum of the squares of a large network's weights is then still a float32."""


class Bounds(NamedTuple):
    """Bounds of a reply's values that a strategy can compute with."""

    weight: float = LARGEST_WEIGHT
    """The largest absolute value of a weight."""
    least_loss: float = -LARGEST_MEAN
    """The largest value of `train_loss`."""
    largest_loss: float = LARGEST_MEAN


def reply_bounds(config: StrategyConfig) -> Bounds:
    """Returns the bounds of a strategy's replies.

    QFedAvg multiplies L (w - w_k) by loss^q and adds that up over the cohort, in float32, with L = 1 /
    client_learning_rate. With loss^q <= 1e20, L <= 1e6 and weights of at most 1e6 a term is at most 2e32, so the sum
    over a million clients is a float32, and so is the sum of the squares of L (w - w_k), each at most 4e24.
    """
    if config.name != "QFedAvg":
        return Bounds()
    q = float(config.args.get("q", inspect.signature(_flower_strategies()["QFedAvg"]).parameters["q"].default))
    return Bounds(1e6, 0.0, 1e6 if q <= 20 / 6 else 10 ** (20 / q))


def build_strategy(config: StrategyConfig) -> Strategy:
    """Returns the server's strategy.

    Raises:
        ConfigError: unknown name, or arguments the strategy does not take.
    """
    # The cohort is drawn by `configure_round`; the strategy trains all of it, however few.
    sampling: dict[str, Any] = {
        "fraction_train": 1.0,
        "min_train_nodes": 1,
        "min_evaluate_nodes": 1,
        "min_available_nodes": 1,
    }
    if config.name == "weighted_mean":
        return WeightedMean(**sampling)
    available = _flower_strategies()
    if config.name not in available:
        hint = " FedProx is a term of the local loss: set training.prox_mu." if config.name == "FedProx" else ""
        if config.name.startswith(_PRIVATE):
            hint = " Differential privacy is not a strategy here: set privacy.kind=server or client."
        hint = hint or did_you_mean(config.name, strategy_names())
        raise ConfigError(f"`strategy.name` (={config.name}) must be one of {', '.join(strategy_names())}.{hint}")
    strategy_class = available[config.name]
    parameters = inspect.signature(strategy_class).parameters
    taken = set(parameters) - set(sampling) - _FIXED
    unknown = sorted(set(config.args) - taken)
    if unknown:
        raise ConfigError(
            f"`strategy.args` has {', '.join(unknown)}, which {config.name} does not take; "
            f"allowed: {', '.join(sorted(taken)) or 'nothing'}."
        )
    arguments: dict[str, Any] = {name: _argument(name, value) for name, value in config.args.items()}
    missing = [name for name in sorted(taken - set(arguments)) if parameters[name].default is inspect.Parameter.empty]
    if missing:
        raise ConfigError(
            f"`strategy.name` (={config.name}) needs {' and '.join(f'strategy.args.{name}' for name in missing)}: "
            f"{_ARGUMENTS[missing[0]][2]}."
        )
    return strategy_class(**sampling, **arguments)


def check_cohort(config: StrategyConfig, cohort_size: int) -> None:
    """Checks that a cohort is large enough for what a robust strategy promises; Flower's go on without a word, or make
    no model.

    Raises:
        ConfigError: it is too small.
    """
    strategy = build_strategy(config)
    if isinstance(strategy, FedTrimmedAvg) and 0 < strategy.beta * cohort_size < 1:
        raise ConfigError(
            f"`strategy.args.beta` (={strategy.beta:g}) of a cohort of {cohort_size} clients is less than one, so "
            f"FedTrimmedAvg would trim nobody: take at least {1 / cohort_size:.3g}, or a larger fraction_train."
        )
    if isinstance(strategy, (Bulyan, MultiKrum)):
        most = strategy.num_malicious_nodes
        least = (4 if isinstance(strategy, Bulyan) else 2) * most + 3
        if most > 0 and cohort_size < least:
            raise ConfigError(
                f"`strategy.args.num_malicious_nodes` (={most}) needs cohorts of at least {least} clients with "
                f"{config.name}, and `fraction_train` gives {cohort_size}: take fewer, or a larger fraction_train."
            )


def _argument(name: str, value: object) -> int | float:
    """Returns an argument of a strategy, checked at once, as Flower would check it in a round, or never."""
    kind, allowed, words = _ARGUMENTS[name]
    right = isinstance(value, (int, kind)) and not isinstance(value, bool) and allowed(value)
    if not right:
        raise ConfigError(f"`strategy.args.{name}` (={as_yaml(value)}) must be {words}.")
    return kind(value)


_COUNT = (int, lambda value: 0 <= value <= LARGEST, "a whole number of at least 0")
_AT_LEAST_ONE = (int, lambda value: 1 <= value <= LARGEST, "a whole number of at least 1")
_POSITIVE = (float, lambda value: 0 < value < math.inf, "a positive number")
_SHARE = (float, lambda value: 0 <= value < 1, "a number in [0, 1)")

_ARGUMENTS: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    **dict.fromkeys(("eta", "eta_l", "tau", "server_learning_rate"), _POSITIVE),
    **dict.fromkeys(("beta_1", "beta_2", "server_momentum"), _SHARE),
    "num_nodes_to_select": _AT_LEAST_ONE,
    "num_malicious_nodes": _COUNT,
    "q": (float, lambda value: 0 <= value <= 10, "a number in [0, 10]"),
    "client_learning_rate": (float, lambda value: 1e-6 <= value <= 1e6, "a number in [0.000001, 1000000]"),
    "beta": (float, lambda value: 0 <= value < 0.5, "a number in [0, 0.5)"),
}
"""Argument of one of Flower's strategies -> its type, whether a value is allowed, and what is."""


_FIXED = (
    {"self", "fraction_evaluate", "train_metrics_aggr_fn", "evaluate_metrics_aggr_fn"}
    | {f"{what}_key" for what in ("arrayrecord", "configrecord")}
    | {"weighted_by_key", "train_loss_key", "selection_rule"}
)
"""Arguments of Flower's strategies that the round loop decides, or that are no numbers."""

_LEFT_OUT = ("Strategy", "Result", "FedProx")
"""FedProx acts on the client: `training.prox_mu`."""
_PRIVATE = "DifferentialPrivacy"
"""Flower's wrappers for differential privacy, in whose place stands `privacy` (see docs/decisions/0011-privacy.md)."""


def _flower_strategies() -> dict[str, type[FedAvg]]:
    """Returns Flower's strategies that aggregate model weights and need no special clients."""
    found = {
        name: getattr(flower_strategies, name)
        for name in flower_strategies.__all__
        if name not in _LEFT_OUT and "Xgb" not in name and not name.startswith(_PRIVATE)
    }
    return cast(dict[str, type[FedAvg]], found)


def begin_round(strategy: Strategy, round_number: int, model: StateDict, cohort: Sequence[int]) -> None:
    """Lets a strategy see the model that is sent in a round: some of Flower's compute with it afterwards.

    Args:
        strategy: any Flower strategy; it sees a grid on which only the cohort is connected.
        round_number: 1-based.
        model: the global one.
        cohort: clients that train.
    """
    if isinstance(strategy, WeightedMean):
        return
    arrays = as_record(model)
    if isinstance(strategy, FedAvgM):  # it would go on from the model it made, though the server may have trained it
        strategy.current_arrays = arrays
    grid = cast(Grid, SimpleNamespace(get_node_ids=lambda: [client + 1 for client in cohort]))
    set_identity()
    list(strategy.configure_train(round_number, arrays, ConfigRecord({}), grid))  # its messages are not sent


def combine(strategy: Strategy, round_number: int, blocks: Iterable[BlockResult], like: StateDict) -> StateDict | None:
    """Returns the strategy's new global model, or None if no result has a positive weight.

    Only `WeightedMean` can work on a stream; Flower's strategies want a list, and divide by the sum of weights.

    Args:
        strategy: any.
        round_number: 1-based.
        blocks: the clients' results, in client order.
        like: a model with the names, types and device of the new one.

    Raises:
        CannotCombine: Flower's strategy does not work with these results (too few for it, say).
    """
    if isinstance(strategy, WeightedMean):
        total = WeightedSum()
        for block in blocks:
            total.merge(WeightedSum.of(block.results) if block.total is None else block.total)
        return total.mean(like)
    results = [result for block in blocks for result in block.results]
    # These compute |x - y|^2 as |x|^2 + |y|^2 - 2 x y: in single precision that is noise where weights are far larger
    # than updates.
    double = isinstance(strategy, (Bulyan, MultiKrum))
    weighted = [as_reply(result, double) for result in results if next(iter(result.parts.values())).weight > 0]
    if not weighted:
        return None
    try:
        with np.errstate(all="ignore"):  # what is not finite is looked for in the result
            combined = strategy.aggregate_train(round_number, weighted)[0]
    except (AppExitException, ArithmeticError, IndexError, ValueError) as error:
        logger.debug("Strategy %s failed", type(strategy).__name__, exc_info=True)  # where: the round has its own error
        reason = f"{type(error).__name__}: {error}"
        raise CannotCombine(f"{type(strategy).__name__} cannot combine {len(weighted)} replies ({reason})") from error
    if combined is None:
        return None
    return {name: _in_type(combined[name].numpy(), value) for name, value in like.items()}


def normalized(blocks: Iterable[BlockResult], model: StateDict, parameters: Collection[str]) -> Iterator[BlockResult]:
    """Yields results whose updates are divided by their number of steps, times the cohort's mean number: FedNova (Wang
    et al., NeurIPS 2020, equation 8 with plain SGD), whose mean is then any strategy's.

    Args:
        blocks: with single models, and with the count "steps".
        model: the one that clients were sent.
        parameters: names of what is trained in it; buffers stay as they are.
    """
    held = list(blocks)
    weights = [(_weight(result), result.counts["steps"][0]) for block in held for result in block.results]
    total = math.fsum(weight for weight, _ in weights)
    mean = math.fsum(weight * steps for weight, steps in weights) / total if total > 0 else 0.0

    def scaled(part: ModelPart, factor: float) -> ModelPart:
        moved = {n: v + (factor - 1) * (v - model[n]) for n, v in part.state.items() if n in parameters}
        return ModelPart({**part.state, **moved}, part.weight)

    for block in held:
        results = []
        for result in block.results:
            steps = result.counts["steps"][0]
            parts = result.parts
            if steps > 0 and steps != mean:
                parts = {name: scaled(part, mean / steps) for name, part in parts.items()}
            results.append(result._replace(parts=parts))
        yield block._replace(results=results)


def _weight(result: ClientResult) -> float:
    """Returns a client's weight over all parts."""
    return math.fsum(part.weight for part in result.parts.values())


def _in_type(mean: np.ndarray, like: Tensor) -> Tensor:
    """Returns a strategy's result, whose arrays are all floats, in the type of its inputs: integers (BatchNorm's batch
    counter) and bools rounded, not truncated.
    """
    values = mean if like.is_floating_point() else np.rint(mean)
    return torch.tensor(values).to(like.device, like.dtype)


def strategy_state(strategy: Strategy) -> dict[str, Any]:
    """Returns a strategy's state between rounds (momentum, ...): numbers and arrays, for a checkpoint."""
    state: dict[str, Any] = {}
    for name, value in vars(strategy).items():
        if isinstance(value, (int, float)) or value is None:
            state[name] = value
        elif isinstance(value, ArrayRecord):
            state[name] = {"record": {key: array.numpy() for key, array in value.items()}}
        elif isinstance(value, dict) and all(isinstance(item, (np.ndarray, np.generic)) for item in value.values()):
            state[name] = {"arrays": {key: np.array(item) for key, item in value.items()}}
        elif isinstance(value, list) and value and all(isinstance(item, np.ndarray) for item in value):
            state[name] = {"list": list(value)}
    return state


def restore_strategy(strategy: Strategy, state: Mapping[str, Any]) -> None:
    """Restores the result of `strategy_state`."""
    for name, value in state.items():
        if isinstance(value, dict) and "record" in value:
            value = ArrayRecord({key: Array(item) for key, item in value["record"].items()})
        elif isinstance(value, dict):
            value = value.get("arrays", value.get("list"))
        setattr(strategy, name, value)
