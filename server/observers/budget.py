"""How much of a run's time drawing may take."""

from __future__ import annotations

import math
from dataclasses import dataclass

SHARE = 0.03
"""Of a run's time, for all its figures; more only where those of the last round alone take more."""
FIRST_GUESS = 1.5
"""Seconds that a set of figures is thought to take before one has been drawn."""
BEFORE = 1.0
"""Seconds that the figure of the partition is thought to have taken."""


@dataclass
class DrawingBudget:
    """Decides whether a round before the last may have figures, from how long those before took.

    What a run computes does not depend on it, only how often it is drawn.

    Args:
        began: when the run did, on the clock that all times here are of, in seconds.
    """

    began: float
    spent: float = BEFORE
    """Seconds spent on figures."""
    longest: float | None = None
    """Seconds that the longest set took; None: none has been drawn."""
    usual: float = math.inf
    """Least seconds that observing an evaluated round has taken without figures."""

    def allows(self, now: float) -> bool:
        """Returns whether there is time for a set of figures, and for that of the last round."""
        one = FIRST_GUESS if self.longest is None else self.longest
        return self.spent + 2 * one <= SHARE * (now - self.began)

    def add(self, seconds: float, drawn: bool) -> None:
        """Takes note of how long observing an evaluated round took, and of whether figures were drawn."""
        if not drawn:
            self.usual = min(self.usual, seconds)
            return
        of_figures = max(0.0, seconds - self.usual) if self.usual < math.inf else seconds
        self.longest = max(self.longest or 0.0, of_figures)
        self.spent += of_figures
