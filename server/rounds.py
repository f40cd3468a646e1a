"""The rounds of a run: the federated learning loop of all methods."""

from __future__ import annotations

import time

from server.server import Server
from server.state import ServerState


def run_rounds(server: Server, state: ServerState) -> ServerState:
    """Runs the remaining rounds and returns the last state.

    Raises:
        RunError: too few clients gave a usable reply, or the model or the shared state holds NaN or infinity.
    """
    for number in range(state.round_number + 1, server.config.num_rounds + 1):
        started = time.perf_counter()
        state = server.begin_stage(state, number)  # most rounds: nothing; else the weights of a new stage
        cohort, invitation = server.invite(state, number)  # some clients, and what they get: model and shared state
        tally, combined = server.collect(cohort, invitation, state)  # checked results: their sums, the averaged model
        model = server.fine_tune(
            state.model if combined is None else combined, number
        )  # on labels of the server, if any
        shared = server.update_shared(state.shared, tally, number)  # from the summed statistics, in closed form
        state = state.next(model, shared, server.recipe, moved=combined is not None)
        metrics = server.observe(state, tally, started)  # evaluation, figures, the run's folder
        server.save(state, metrics)
    return state
