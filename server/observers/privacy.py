"""The epsilon that a run has spent so far."""

from __future__ import annotations

from collections.abc import Mapping

from fedlabel.experiment import Experiment
from fedlabel.privacy import epsilon
from server.observers.base import Observer, Report, Round
from server.state import ServerState


class PrivacyObserver(Observer):
    """Reports epsilon after each round, see `privacy.epsilon`.

    Args:
        experiment: the run's.
        simulated: whether clients are simulated: real ones know the seed, and with it who is drawn when, so that
            sampling protects nobody from them.
    """

    def __init__(self, experiment: Experiment, simulated: bool) -> None:
        super().__init__(experiment)
        self._simulated = simulated
        self._uploads: dict[int, int] = {}
        """Client -> rounds that it was asked in (kind=client)."""

    def dump(self) -> dict[int, int]:
        """Returns how often each client was asked."""
        return self._uploads

    def load(self, remembered: Mapping[int, int]) -> None:
        """Restores the result of `dump`."""
        self._uploads = dict(remembered)

    def after_round(self, seen: Round, state: ServerState) -> Report:
        """See `Observer`."""
        config, privacy = self.experiment.config, self.experiment.config.privacy
        if privacy.kind == "client":
            self._uploads = self._uploads | {client: self._uploads.get(client, 0) + 1 for client in seen.tally.cohort}
            return Report({"privacy/epsilon": epsilon(privacy, max(self._uploads.values()))})
        drawn = (config.cohort_size, config.num_clients) if self._simulated else ()
        return Report({"privacy/epsilon": epsilon(privacy, seen.number, *drawn)})
