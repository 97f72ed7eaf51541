"""Counters behind ``state.stats``, written by the training thread alone."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from commhooks.engine.vectors.devices import Moment

__all__ = ["Meter"]


@dataclass
class Meter:
    """What has been sent and how long it took; see :class:`commhooks.Stats` for the units."""

    rounds_launched: int = 0
    rounds_used: int = 0
    bytes_reduced: int = 0
    seconds_exposed: float = 0.0
    seconds_hidden: float = 0.0

    def __post_init__(self) -> None:
        # On a GPU the moments may lie ahead of the host, which must not wait for them.
        self._open: deque[tuple[Moment, Moment, Moment, Moment]] = deque()

    def communication(
        self, launched: Moment, arrived: Moment, wait_began: Moment, wait_ended: Moment
    ) -> None:
        """Account for communication in flight between two moments, and a wait between two."""
        self._open.append((launched, arrived, wait_began, wait_ended))
        self.settle(wait=False)

    def settle(self, *, wait: bool) -> None:
        """Count what is over; with ``wait`` everything, once it is."""
        while self._open and (wait or all(moment.passed for moment in self._open[0])):
            launched, arrived, wait_began, wait_ended = self._open.popleft()
            seen = max(0.0, arrived.seconds_since(wait_began))
            self.seconds_exposed += max(0.0, wait_ended.seconds_since(wait_began))
            self.seconds_hidden += max(0.0, arrived.seconds_since(launched) - seen)
