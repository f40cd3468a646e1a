"""How much of a run's time drawing may take."""

from __future__ import annotations

from dataclasses import dataclass

SHARE = 0.02
"""Of a run's time, for the figures of all rounds before the last."""
FIRST_GUESS = 1.5
"""Seconds that a set of figures is thought to take before one has been drawn."""


@dataclass
class DrawingBudget:
    """Decides whether a round before the last may have figures, from how long those before took.

    What a run computes does not depend on it, only how often it is drawn.

    Args:
        began: when the run did, on the clock that all times here are of, in seconds.
    """

    began: float
    spent: float = 0.0
    """Seconds spent on figures."""
    longest: float = FIRST_GUESS
    """Seconds that the longest set took."""
    usual: float = 0.0
    """Seconds that observing a round takes without figures."""

    def allows(self, now: float) -> bool:
        """Returns whether there is time for a set of figures."""
        return self.spent + self.longest <= SHARE * (now - self.began)

    def add(self, seconds: float, drawn: bool) -> None:
        """Takes note of how long observing an evaluated round took, and of whether figures were drawn."""
        if not drawn:
            self.usual = seconds
            return
        of_figures = max(0.0, seconds - self.usual)
        self.longest = of_figures if self.spent == 0.0 else max(self.longest, of_figures)
        self.spent += of_figures
