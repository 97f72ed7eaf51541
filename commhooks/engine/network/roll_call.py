"""All ranks at the same point, or an error on all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from commhooks.engine.meter import Meter
from commhooks.engine.network.agreement import by_rank, tell
from commhooks.engine.network.links import Links
from commhooks.engine.network.ticket import Point, Ticket
from commhooks.engine.network.words import plain
from commhooks.engine.vectors.devices import Moment
from commhooks.errors import RoundError

__all__ = ["RollCall"]

T = TypeVar("T")


class RollCall:
    """Where this rank is, whether the others are there too, and the failure that ended it all.

    Args:
        algorithm: its name, for errors.
        links: the ranks.
        meter: knows the number of the last round, and where seconds are counted.
        step: tells the number of steps so far.
        in_island: tells whether the next step averages gradients in the island alone.

    Attributes:
        device: where tickets are made out.
    """

    def __init__(
        self,
        algorithm: str,
        links: Links,
        meter: Meter,
        step: Callable[[], int],
        in_island: Callable[[], bool],
    ) -> None:
        self.device = torch.device("cpu")
        self._algorithm = algorithm
        self._links = links
        self._meter = meter
        self._step = step
        self._in_island = in_island
        # What to raise, not the error itself: its traceback would keep the model alive.
        self._failure: tuple[Any, ...] | None = None

    @property
    def failed(self) -> bool:
        """Whether a round has failed, after which the ranks can do nothing together."""
        return self._failure is not None

    def point(self, what: str) -> Point:
        """Where this rank is."""
        return Point(what, self._step(), self._meter.rounds_launched)

    def raise_if_failed(self) -> None:
        """Raise the error that a round has ended in.

        Raises:
            RoundError: one has.
        """
        if self._failure is not None:
            raise self.failure()

    def failure(self) -> RoundError:
        """The error that a round has ended in."""
        assert self._failure is not None
        return RoundError(*self._failure)

    def error(self, cause: str, number: int | None = None, *, passing: bool = False) -> RoundError:
        """An error of the last round, or of the one with that number."""
        number = self._meter.rounds_launched if number is None else number
        ranks = tuple(self._links.everyone.ranks)
        return RoundError(self._algorithm, number, self._step(), ranks, plain(cause), passing)

    def note_failure(self, cause: str, number: int | None = None) -> None:
        """From now on there is only this error; what is in flight may never arrive."""
        self._failure = self.error(cause, number).args
        self._links.busy()

    def note_failure_in_island(self, cause: str, number: int | None = None) -> None:
        """The same, where the other islands do not know of it: they hear it from their next ticket.

        They may be at anything, so nobody here waits for them.
        """
        self.note_failure(cause, number)
        # What cannot be told, they find out when this process ends.
        with suppress(RuntimeError):
            Ticket(self._links.everyone, self.device, self.point("an error in its island"))

    def fail(self, cause: str, number: int | None = None) -> NoReturn:
        """Note the failure, and raise it.

        Raises:
            RoundError: always.
        """
        self.note_failure(cause, number)
        self._tell_island()
        raise self.failure()

    def fail_alone(self, cause: str, number: int | None = None) -> NoReturn:
        """The same, where no other rank knows of it: they all hear it from their next ticket.

        Raises:
            RoundError: always.
        """
        self.note_failure_in_island(cause, number)
        self._tell_island()
        raise self.failure()

    def tell(self, what: str, mine: T) -> list[T]:
        """Every rank's value, in the order of the ranks. Collective; blocks.

        Raises:
            RoundError: a rank has left, or the ranks wait for one another.
        """
        try:
            return tell(self._links.everyone.parent, mine)
        except RuntimeError as error:
            self.fail(f"{what}: {error}")

    def _tell_island(self) -> None:
        """A rank of the island may be in a step that waits for this one, or get there first."""
        if self._links.island is not None:
            with suppress(RuntimeError):
                Ticket(self._links.island, self.device, self.point("an error in its island"))

    def __call__(
        self,
        what: str,
        refusal: str | None = None,
        probes: Sequence[Tensor] = (),
        digest: int = 0,
    ) -> Ticket:
        """Send a ticket and wait for those of the others. Collective.

        Nothing else may be in flight; where a rank refuses, all ranks can go on.

        A rank that has not come is in the middle of a step, and waits there: for its island if that
        averages gradients, else for all ranks. It is met where it waits.

        Returns:
            The ticket, which has come back. It may say that others are at a round or at their
            start, which this rank has to take part in before it calls again.

        Raises:
            RoundError: the ranks are not at the same point, one of them has NaN or inf or a reason
                to refuse, or the tickets did not get through.
        """
        began = Moment(self.device)
        if self._links.island is not None and self._in_island():
            try:
                problem = Ticket(self._links.island, self.device, self.point(what)).wait().problem
            except RuntimeError as error:
                problem = f"{what}: {error}"
            if problem is not None:
                self.note_failure_in_island(problem)
                raise self.failure()
        everyone = self._links.everyone
        try:
            ticket = Ticket(
                everyone,
                self.device,
                self.point(what),
                probes=probes,
                refused=refusal is not None,
                digest=digest,
            )
            verdict = ticket.wait()
        except RuntimeError as error:
            self.fail(f"{what}: {error}")
        self._meter.communication(began, began, began, Moment(self.device))
        if verdict.problem is not None:
            self.fail(verdict.problem)
        if verdict.refused and verdict.joined is not None:
            # Others may be in a round, and look where its refusals are posted.
            place = f"round {verdict.joined.number}"
            if refusal is not None:
                everyone.post(place, refusal)
            self.fail(everyone.read(place, verdict.refused))
        if verdict.refused:
            raise self.error(by_rank(self.tell(what, refusal), everyone.ranks), passing=True)
        return ticket
