"""Metrics that clients report of their training, and the cost of a round."""

from __future__ import annotations

import time

from fedlabel.learning.metrics import means
from server.observers.base import Observer, Report, Round
from server.state import ServerState


class TrainingObserver(Observer):
    """Means of the methods' metrics."""

    def after_round(self, seen: Round, state: ServerState) -> Report:
        """See `Observer`."""
        return Report(metrics=means(seen.tally.sums))


class SystemObserver(Observer):
    """Bytes, passes through networks, failures and seconds."""

    def after_round(self, seen: Round, state: ServerState) -> Report:
        """See `Observer`."""
        tally, counts = seen.tally, seen.counts
        metrics = {
            "comm/bytes_up": float(tally.bytes_up),
            "comm/bytes_down": float(tally.bytes_down),
            "system/failed_clients": float(tally.num_failed),
            "system/refused_replies": float(tally.refused),
            "system/stacked_clients": float(tally.num_stacked),
            "system/round_seconds": time.perf_counter() - seen.started,
        }
        metrics |= {f"system/{name}": value for name, value in tally.pace.items()}
        if "passes" in counts:  # real clients under `privacy` send none
            metrics["train/forward_samples"], metrics["train/backward_samples"] = counts["passes"]
        if "claimed_bytes" in counts:
            metrics["comm/claimed_bytes_up"], metrics["comm/claimed_bytes_down"] = counts["claimed_bytes"]
        return Report(metrics)
