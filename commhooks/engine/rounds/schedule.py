"""When a state does what: numbers of steps, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Schedule"]


@dataclass
class Schedule:
    """When the next round is launched, and when the one in flight is used.

    Launches fall right after the steps ``origin + offset + tau k``, k = 0, 1, .... A round lands,
    which is to say that its result is mixed into the model, ``delay`` steps after its launch::

        tau = 3, delay = 3, warm-up of 2   step      1  2 | 3  4  5  6  7  8  9
                                           averaged  g  g |
                                           launch         |       1        2
                                           landing        |                1
                                                          origin = 2, offset = 3

    Attributes:
        tau: steps from one launch to the next.
        delay: steps from a launch to its landing, 0 (the training thread waits) to ``tau``.
        offset: steps from the origin to the first launch.
        launch: the step after which the next round is launched.
        landing: the step after which what has been launched is used; None if nothing has been.
    """

    tau: int
    delay: int
    offset: int
    launch: int = 0
    landing: int | None = None

    @property
    def next(self) -> int:
        """The step after which there is something to do: to land, to launch, or both."""
        return self.launch if self.landing is None else min(self.landing, self.launch)

    def launched(self) -> None:
        """A round has been launched, at its step or later."""
        self.landing = self.launch + self.delay
        self.launch += self.tau

    def landed(self) -> None:
        """It has been used."""
        self.landing = None

    def restart(self, origin: int) -> None:
        """Begin anew after the step ``origin``."""
        self.launch = origin + self.offset
        self.landing = None
