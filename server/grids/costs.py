"""How long clients will take: by the samples that they draw, and by how long they took per sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable


class CostModel:
    """Predicts seconds: the samples a client draws at most, times the seconds per sample that were measured.

    Args:
        draws: client -> samples that it draws at most in a round.
    """

    def __init__(self, draws: Callable[[int, int], int]) -> None:
        self._draws = draws
        self._rates: dict[int, float] = {}
        """Client -> seconds per sample when it last trained."""
        self._seconds, self._samples = 0.0, 0

    def predict(self, clients: Iterable[int], round_number: int) -> float:
        """Returns the predicted seconds of a task; of clients that never trained by the mean over all."""
        usual = self._seconds / self._samples if self._samples else 1.0
        return sum(self._rates.get(c, usual) * self._drawn(c, round_number) for c in clients)

    def measured(self, clients: list[int], round_number: int, seconds: float) -> None:
        """Takes note of how long the clients of a task took together."""
        samples = sum(self._drawn(client, round_number) for client in clients)
        self._rates |= dict.fromkeys(clients, seconds / samples)
        self._seconds += seconds
        self._samples += samples

    def _drawn(self, client: int, round_number: int) -> int:
        return 1 + self._draws(client, round_number)  # a client without samples takes some time, too
