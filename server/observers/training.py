"""Metrics that clients report of their training, and the cost of a round."""

from __future__ import annotations

import time

import numpy as np

from fedlabel.learning.metrics import means, tenths
from server.observers.base import Observer, Report, Round
from server.state import ServerState

OF_CLIENTS = {
    "train/loss": ("train/client_loss", "train/lowest_10pct_client_loss", "train/highest_10pct_client_loss"),
    "pseudo/coverage": (None, "pseudo/lowest_10pct_client_coverage", "pseudo/highest_10pct_client_coverage"),
    "pseudo/from_global": ("pseudo/client_from_global", None, None),
}
"""Metric -> what is reported of the clients that trained: a list, and means of the lowest and the highest tenth."""


class TrainingObserver(Observer):
    """Means of the methods' metrics, and how some of them differ between clients."""

    def after_round(self, seen: Round, state: ServerState) -> Report:
        """See `Observer`."""
        report = Report(metrics=means(seen.tally.sums))
        clients = {client: means(sums) for client, sums in sorted(seen.tally.client_sums.items())}
        for name, (of_each, *bounds) in OF_CLIENTS.items():
            found = {client: metrics[name] for client, metrics in clients.items() if name in metrics}
            if not found:
                continue
            if of_each is not None:
                report.lists[of_each] = self.of_trained(found)
            values = tenths(np.array(list(found.values())))
            report.metrics.update({tag: value for tag, value in zip(bounds, values, strict=True) if tag is not None})
        return report


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
