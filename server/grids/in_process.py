"""All clients in this process, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

from server.grids.base import SimulationGrid, answer, client_of, make_context, reply_to


class InProcessGrid(SimulationGrid):
    """Calls the client app in this process, one client after the other."""

    def __init__(self, client_app: ClientApp, num_clients: int) -> None:
        super().__init__(num_clients)
        self._client_app = client_app

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """See `SimulationGrid`. A client in this process cannot be interrupted: `timeout` is not applied."""
        for message in messages:
            self._number(message)
            context = make_context(
                client_of(message), self.num_clients, self.states.get(client_of(message), RecordDict())
            )
            result, state = answer(self._client_app, message, context)
            if state is not None:
                self.states[client_of(message)] = state
            yield reply_to(message, result)
