"""Client apps of real nodes that misbehave; see `cohorts.py` for simulated clients."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flwr.app import Context, Message
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


def always_raise(message: Message, context: Context) -> Message:
    raise RuntimeError("this client always raises")
