"""Client apps that misbehave or remember; workers import them by name."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping

import numpy as np
from flwr.app import Array, ConfigRecord, Context, Message, MetricRecord
from flwr.clientapp import ClientApp

from clients.client_app import query, train

Handler = Callable[[Message, Context], Message]


def by_client(handlers: Mapping[int, Handler], default: Handler = train) -> ClientApp:
    """Returns the real app, but with a training handler of their own for some clients."""
    app = ClientApp()
    app.query()(query)

    @app.train()
    def dispatch(message: Message, context: Context) -> Message:
        return handlers.get(int(context.node_config["partition-id"]), default)(message, context)

    return app


def _round(message: Message) -> int:
    return int(message.content.config_records["config"]["server-round"])  # type: ignore[arg-type]


def _always_raise(message: Message, context: Context) -> Message:
    raise RuntimeError("this client always raises")


def _raise_from_round_2(message: Message, context: Context) -> Message:
    return train(message, context) if _round(message) == 1 else _always_raise(message, context)


def _raise_in_round_1(message: Message, context: Context) -> Message:
    """Fails as long as `_die_in_round_1` does."""
    return train(message, context) if _round(message) > 1 else _always_raise(message, context)


def _nan(message: Message, context: Context) -> Message:
    reply = train(message, context)
    arrays = reply.content.array_records["arrays"]
    name, array = next(iter(arrays.items()))
    values = array.numpy().copy()
    values.flat[-1] = np.nan
    arrays[name] = Array(values)
    return reply


def _die_in_round_1(message: Message, context: Context) -> Message:
    if _round(message) > 1:
        return train(message, context)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def _count(message: Message, context: Context) -> Message:
    """Trains, and reports how often this client has trained as its `train/loss`: other metrics would be refused."""
    seen = int(context.state.metric_records["memory"]["seen"]) if len(context.state) else 0  # type: ignore[arg-type]
    context.state["memory"] = MetricRecord({"seen": seen + 1})
    reply = train(message, context)
    sums = dict(reply.content.config_records["sums"])
    reply.content["sums"] = ConfigRecord({**sums, "train/loss": [float(seen + 1), 1.0]})
    return reply


def _statistics_of_many(message: Message, context: Context) -> Message:
    """Permutes its counts and multiplies them by a million."""
    reply = train(message, context)
    name, numbers = next(iter(reply.content.config_records["statistics"].items()))
    start = 1 + int(numbers[0])  # type: ignore[index,arg-type]
    changed = [*numbers[:start], *(1e6 * x for x in reversed(numbers[start:]))]  # type: ignore[index,arg-type]
    reply.content["statistics"] = ConfigRecord({name: changed})  # type: ignore[dict-item]
    return reply


healthy = by_client({})
poisoned = by_client({3: _statistics_of_many})
only_raises = by_client({3: _always_raise})
two_fail = by_client({1: _always_raise, 3: _nan})
three_fail = by_client({1: _always_raise, 2: _die_in_round_1, 3: _nan})
three_fail_alive = by_client({1: _always_raise, 2: _raise_in_round_1, 3: _nan})
all_fail_from_round_2 = by_client({}, default=_raise_from_round_2)
counting = by_client({}, default=_count)
