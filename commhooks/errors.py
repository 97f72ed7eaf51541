"""The errors this package raises, all under :class:`CommHooksError`."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "CheckpointError",
    "CommHooksError",
    "HyperParameterError",
    "RegistrationError",
    "RoundError",
]


class CommHooksError(Exception):
    """Base of every error of this package."""


class HyperParameterError(CommHooksError, ValueError):
    """An argument of a state's constructor has the wrong type or lies outside its range."""


class RegistrationError(CommHooksError, RuntimeError):
    """A state cannot be attached to this model, these optimizers or this process group."""


class CheckpointError(CommHooksError, ValueError):
    """A state dictionary does not belong to this state."""


class RoundError(CommHooksError, RuntimeError):
    """A round failed; the local parameters are as the optimizer last left them.

    Attributes:
        algorithm: class name of the state.
        round: number of the failed round, counted from 1.
        step: step at which the failure surfaced, counted from 1.
        ranks: global ranks that take part in the rounds.
        cause: what the communication backend (or the chained update) reported.
        passing: whether training can go on, on all ranks, since nothing was in flight.
    """

    def __init__(
        self,
        algorithm: str,
        number: int,
        step: int,
        ranks: Sequence[int],
        cause: str,
        passing: bool = False,
    ) -> None:
        self.algorithm = algorithm
        self.round = number
        self.step = step
        self.ranks = tuple(ranks)
        self.cause = cause
        self.passing = passing
        super().__init__(algorithm, number, step, self.ranks, cause, passing)

    def __str__(self) -> str:
        cause = self.cause if self.cause.rstrip().endswith(".") else f"{self.cause}."
        advice = (
            "Nothing has changed, and training can go on."
            if self.passing
            else "The local parameters are as the optimizer last wrote them; restart the job from "
            "its newest checkpoint."
        )
        return (
            f"{self.algorithm}: round {self.round} failed at step {self.step} among ranks "
            f"{list(self.ranks)}: {cause} {advice}"
        )
