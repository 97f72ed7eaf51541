"""When a state does what: numbers of steps, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Cycle", "Schedule"]


@dataclass
class Schedule:
    """When a fragment's next round is launched, and when the one in flight is used.

    A round lands, which is to say that its result is mixed into the model, ``delay`` steps after
    its launch::

        tau = 3, delay = 3, warm-up of 2   step      1  2 | 3  4  5  6  7  8  9
                                           averaged  g  g |
                                           launch         |       1        2
                                           landing        |                1

    Attributes:
        delay: steps from a launch to its landing, 0 (the training thread waits) to tau; None for a
            landing with the next launch.
        launch: the step after which the next round is launched.
        landing: the step after which what has been launched is used; None if nothing has been.
        begun: whether there has been a launch since the start.
    """

    delay: int | None
    launch: int = 0
    landing: int | None = None
    begun: bool = False

    @property
    def next(self) -> int:
        """The step after which there is something to do: to land, to launch, or both."""
        return self.launch if self.landing is None else min(self.landing, self.launch)

    def landed(self) -> None:
        """What was launched has been used."""
        self.landing = None


class Cycle:
    """The turns that P fragments take, one launch each in a cycle of tau steps.

    Fragment p = 1..P launches after step ``start + ceil(p tau / P)``, and the last launch of a
    cycle is the start of the next one. There tau may change.

    Args:
        schedules: one a fragment.
        tau: steps of the first cycle.

    Attributes:
        start: the step that the cycle is counted from.
        tau: its steps.
        next_tau: those of the next one.
    """

    def __init__(self, schedules: Sequence[Schedule], tau: int) -> None:
        self._schedules = list(schedules)
        # A round lands before the next one is launched.
        self._least = max((schedule.delay or 1 for schedule in schedules), default=1)
        self.start = 0
        self.tau = self.next_tau = max(tau, self._least)

    def restart(self, origin: int) -> None:
        """Begin anew after the step ``origin``."""
        self.start, self.tau = origin, self.next_tau
        for number, schedule in enumerate(self._schedules):
            schedule.launch, schedule.landing = self.turn(number), None
            schedule.begun = False

    def launched(self, schedule: Schedule) -> None:
        """A fragment has launched, at its step or later."""
        at = schedule.launch
        if schedule is self._schedules[-1]:
            self.start, self.tau = at, self.next_tau
            for number, each in enumerate(self._schedules):
                # Where tau has become shorter, one of the last cycle may still have to land.
                each.launch = max(self.turn(number), each.landing or 0)
        else:
            schedule.launch = self.turn(self._schedules.index(schedule), after=1)
        schedule.landing = schedule.launch if schedule.delay is None else at + schedule.delay
        schedule.begun = True

    def adopt(self, tau: int) -> None:
        """Take ``tau`` for the next cycle; for this one if its only launch is still to come.

        Every rank does so at the same step, right after a landing.
        """
        self.next_tau = max(tau, self._least)
        if len(self._schedules) == 1 and self._schedules[0].landing is None:
            self.tau = self.next_tau
            self._schedules[0].launch = self.turn(0)

    def state_dict(self) -> dict[str, int]:
        """As plain values."""
        return {"start": self.start, "tau": self.tau, "next_tau": self.next_tau}

    def load_state_dict(self, saved: Mapping[str, int]) -> None:
        """Go on from what :meth:`state_dict` gave; the schedules are loaded by themselves."""
        self.start, self.tau, self.next_tau = saved["start"], saved["tau"], saved["next_tau"]

    def turn(self, number: int, *, after: int = 0) -> int:
        """The step of a fragment's launch in this cycle, or some cycles after, as tau is now."""
        return self.start + after * self.tau - (-(number + 1) * self.tau // len(self._schedules))
