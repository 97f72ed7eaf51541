"""Counters behind ``state.stats``, written by the training thread alone."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Meter"]


@dataclass
class Meter:
    """What has been sent and how long it took; see :class:`commhooks.Stats` for the units."""

    rounds_launched: int = 0
    rounds_used: int = 0
    bytes_reduced: int = 0
    seconds_exposed: float = 0.0
    seconds_hidden: float = 0.0

    def communication(self, in_flight: float, waited: float) -> None:
        """Account for communication in flight for ``in_flight`` s, of which ``waited`` s showed."""
        self.seconds_exposed += waited
        self.seconds_hidden += max(0.0, in_flight - waited)
