"""When a state does what: counters of steps and boundaries, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Schedule"]


@dataclass
class Schedule:
    """Steps and boundaries of one rank.

    A boundary falls right after the steps ``origin + tau, origin + 2 tau, ...``::

        tau = 3, warm-up of 2      step      1  2 | 3  4  5  6  7  8  9
                                   averaged  g  g |
                                   boundary       |       x        x
                                                  origin = 2

    Attributes:
        tau: steps from one boundary to the next.
        origin: step number after which the local steps begin.
        step: DDP backwards with gradient sync on, so far.
        boundaries: boundaries run since ``origin``.
    """

    tau: int
    origin: int
    step: int = 0
    boundaries: int = 0

    @property
    def local(self) -> bool:
        """Whether the last step was a local one."""
        return self.step > self.origin

    @property
    def due(self) -> bool:
        """Whether a boundary has been reached and not been run yet.

        More than one can be due, where an optimizer went several times ``tau`` without a step.
        """
        return (self.step - self.origin) // self.tau > self.boundaries

    def advance(self) -> None:
        """Count a step."""
        self.step += 1

    def restart(self) -> None:
        """Begin the local steps anew after the last step; warm-up, if still on, goes on."""
        self.origin = max(self.origin, self.step)
        self.boundaries = 0
