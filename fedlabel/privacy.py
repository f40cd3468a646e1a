"""What of a client's data the server may see: settings of its protection."""

from __future__ import annotations

from dataclasses import dataclass

from fedlabel.checks import at_least


@dataclass(frozen=True)
class PrivacyConfig:
    """Protection of the clients' data (see docs/trust.md)."""

    min_count: int = 1
    """Fewest samples that anything but a model may be made of: a client with fewer samples takes no part; one with
    fewer samples of some kind of label, or fewer bags, sends its model without statistics and metrics; and a metric of
    fewer samples is left out. A node may have a larger one of its own. 1: nothing is left out."""

    def __post_init__(self) -> None:
        at_least(self, "privacy", 1, "min_count")
