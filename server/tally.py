"""Adds up the results of a round: counts, metrics and statistics of the clients, and who failed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from fedlabel.cohort import ClientResult, Invitation
from fedlabel.learning.metrics import Counts, add_counts
from fedlabel.methods.batch import State
from server.blocks import BlockResult, Failure
from server.schema import harmless
from server.traffic import ResultBytes, invitation_bytes

LONGEST_FAILURE = 10_000
"""Characters of a client's own words (a traceback, say) that are kept."""


class RoundTally:
    """The sums over the clients of one round.

    Args:
        invitation: what is sent.
        cohort: to whom.
        result_bytes: the size of a result.
    """

    def __init__(self, invitation: Invitation, cohort: Sequence[int], result_bytes: ResultBytes) -> None:
        self.invitation, self.cohort = invitation, list(cohort)
        self.failures: list[str] = []
        """One text per failed client or refused reply: a line that says who and what, then a traceback, indented."""
        self.refused = 0
        """Results that came and were not used."""
        self.sums: Counts = {}
        self.client_counts: dict[int, Counts] = {}
        """Of each client whose result is used."""
        self.client_sums: dict[int, Counts] = {}
        """Likewise: the metrics of its training, (sum, count) each."""
        self.excused: set[int] = set()
        """Clients without a result who are not counted as failed: late, dropped out, or still training."""
        self.pace: dict[str, float] = {}
        """Numbers of the simulated clock, see `Pacing`."""
        self.num_stacked = 0
        """Clients whose result is used and who trained in a stack of several."""
        self.bytes_down = invitation_bytes(invitation, cohort)
        self.bytes_up = 0
        self._result_bytes = result_bytes
        self._statistics: dict[str, np.ndarray] = {}

    @property
    def round_number(self) -> int:
        """1-based."""
        return self.invitation.round_number

    def watch(self, blocks: Iterable[BlockResult]) -> Iterator[BlockResult]:
        """Passes on blocks, in their order, and adds them up."""
        for block in blocks:
            for result in block.results:
                self._add(result)
            for failure in block.failures:
                self._note(failure)
            yield block

    def _add(self, result: ClientResult) -> None:
        self.bytes_up += self._result_bytes.of(result)
        self.client_counts[result.client] = result.counts
        self.client_sums[result.client] = result.sums
        self.num_stacked += result.stacked
        self.sums = add_counts([self.sums, result.sums])
        for name, tensor in result.statistics.items():
            values = tensor.detach().cpu().double().numpy()
            self._statistics[name] = self._statistics[name] + values if name in self._statistics else values

    def statistics(self, device: torch.device) -> State:
        """Returns the sum of the used results' statistics, float32; empty without a usable result."""
        return {n: torch.tensor(v, dtype=torch.float32, device=device) for n, v in self._statistics.items()}

    @property
    def num_usable(self) -> int:
        """Number of clients with a usable result so far."""
        return len(self.client_counts)

    @property
    def num_excused(self) -> int:
        """Number of clients of the cohort without one who did not fail."""
        return len(self.excused & set(self.cohort) - self.client_counts.keys())

    @property
    def num_failed(self) -> int:
        """Number of clients of the cohort without one who are not excused."""
        return len(set(self.cohort) - self.excused - self.client_counts.keys())

    def invite(self, clients: Sequence[int]) -> None:
        """Adds clients to the cohort."""
        self.cohort += clients
        self.bytes_down += invitation_bytes(self.invitation, clients)

    def unreached(self, clients: Sequence[int]) -> None:
        """Takes note that clients of the cohort have received nothing."""
        self.bytes_down -= invitation_bytes(self.invitation, clients)

    def late(self, result: ClientResult) -> None:
        """Takes note of a result that arrived too late."""
        self.bytes_up += self._result_bytes.of(result)

    def _note(self, failure: Failure) -> None:
        """Records a failure; a client's text can neither control a terminal nor look like another's failure."""
        self.refused += failure.refused
        first, *more = harmless(failure.reason, LONGEST_FAILURE).split("\n")
        lines = [
            f"Round {self.round_number}, {failure.who}: {harmless(first)}",
            *(f"    {line}" for line in more if line),
        ]
        self.failures.append("\n".join(lines))
