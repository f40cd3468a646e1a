"""The rounds of a run: the federated learning loop of all methods."""

from __future__ import annotations

import time

from server.server import Server
from server.state import ServerState


def run_rounds(server: Server, state: ServerState) -> ServerState:
    """Runs the remaining rounds and returns the last state.

    Raises:
        RunError: too few clients gave a usable reply, or the model or the shared state is finite no more.
    """
    for number in range(state.round_number + 1, server.config.num_rounds + 1):
        started = time.perf_counter()
        state = server.begin_stage(state, number)  # fresh weights, where a stage of the recipe begins with this round
        messages = server.invite(state, number)  # a cohort of clients; the model and the shared state for each
        tally, combined = server.collect(messages, state, number)  # their replies, checked one by one and combined
        model = server.fine_tune(state.model if combined is None else combined, number)  # labels at the server
        shared = server.update_shared(state.shared, tally, number)  # closed form of the summed statistics
        state = state.next(model, shared, server.recipe, moved=combined is not None)
        metrics = server.observe(state, tally, started)  # evaluation, figures, the run's folder
        server.save(state, metrics)
    return state
