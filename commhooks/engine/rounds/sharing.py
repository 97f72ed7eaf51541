"""The ranks of an island put together what each has computed of its share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import NoReturn

from commhooks.engine.guards.interrupts import uninterrupted
from commhooks.engine.network.agreement import by_rank
from commhooks.engine.network.links import Links
from commhooks.engine.network.roll_call import RollCall
from commhooks.engine.network.ticket import Ticket
from commhooks.engine.rounds.fragment import Fragment
from commhooks.engine.rounds.gathering import Gathering
from commhooks.engine.rounds.leader import Leader
from commhooks.engine.rules import Rules
from commhooks.engine.steps.optimizers import OptimizerWatch

__all__ = ["Sharing"]


class Sharing:
    """The landing of fragments that the ranks of an island share out.

    Nothing is written to the parameters before all of it is there. Where a round lands later than
    at once, that is gathered ahead, in the background, and nobody waits at the landing. The ranks
    agree in every backward on what to gather, with the ticket that they exchange anyway, and start
    at its end: so they all start the same, in the same order, and only what all of them can use.
    What is not started by the landing is gathered there.

    Args:
        links: the ranks.
        call: where they are, and where a failure is noted.
        fragments: all of them.
    """

    def __init__(self, links: Links, call: RollCall, fragments: Sequence[Fragment]) -> None:
        assert links.island is not None
        self._links = links
        self._island = links.island
        self._call = call
        self._fragments = fragments
        self._leader = Leader(self._island)

    # Ahead of a landing, and between ranks that train and ranks that have no batches left.

    def word(self, *, started: bool, trains: bool) -> int:
        """What this rank tells the others in a backward, see :meth:`heed`.

        Args:
            started: whether there may be something to gather.
            trains: whether the rank has a batch.
        """
        return 2 * (self.ready() if started else 0) + (not trains)

    def heed(self, told: Mapping[int, int]) -> int:
        """Take note of what each rank has said, by its number.

        Returns:
            How many results all ranks of the island are :meth:`ready` for.
        """
        self._leader.note({rank: word % 2 == 0 for rank, word in told.items()})
        return min(told[rank] // 2 for rank in self._island.ranks)

    def ready(self) -> int:
        """How many of the results that are to land this rank can give its share of, and use.

        They are counted in the order in which they land, up to the first that is not there yet.
        """
        if self._links.shares is None:
            return 0
        return sum(1 for _ in takewhile(_is_ready, self._awaited))

    def gather(self, rules: Rules, agreed: int) -> None:
        """Start gathering, in the background. Collective in the island.

        Args:
            rules: the algorithm.
            agreed: what :meth:`heed` gave. What lies beyond it and has been started is dropped,
                since a rank cannot use it any more.

        Raises:
            RoundError: it could not be started.
        """
        if self._links.shares is None:
            return
        try:
            with uninterrupted():
                for number, fragment in enumerate(self._awaited):
                    if number >= agreed:
                        fragment.drop_gathering()
                    elif fragment.gathering is None:
                        self._links.busy()
                        fragment.offer(rules)
                        self._start(fragment)
        except Exception as error:  # noqa: BLE001 - rules may raise anything
            self._call.fail_alone(str(error))

    def follow(self, fragments: Sequence[Fragment]) -> None:
        """Give ranks without batches the parameters that the others have. Collective there.

        Raises:
            RoundError: a rank has a refusal, they are not at the same point, or one is gone.
        """
        if not self._leader.needed:
            return
        refusals = [fragment.refusal() for fragment in fragments]
        refusal = next(filter(None, refusals), None)
        if not self._meet(refusal):
            self._refuse(refusal)
        try:
            self._leader.share_parameters([b for each in fragments for b in each.buckets])
        except RuntimeError as error:
            self._fail(str(error))

    def end_together(self, optimizers: OptimizerWatch) -> None:
        """No rank has batches any more: let all go on as one from here. Collective there.

        Raises:
            RoundError: a rank has a refusal, they are not at the same point, or one is gone.
        """
        if not self._leader.needed:
            return
        self.follow(self._fragments)
        try:
            self._leader.share_optimizers(optimizers, self._call.device)
        except Exception as error:  # noqa: BLE001 - an optimizer may raise anything
            self._fail(str(error))
        self._leader.forget()

    def settle(self) -> None:
        """Wait for what is being gathered.

        Raises:
            RoundError: a rank is gone.
        """
        for fragment in self._fragments:
            if fragment.gathers:
                self._put_together(fragment)

    @property
    def _awaited(self) -> list[Fragment]:
        """Those with something to land, in the order in which it does, the same on all ranks."""
        dated = [(f.schedule.landing, f) for f in self._fragments if f.schedule.landing is not None]
        return [fragment for _, fragment in sorted(dated, key=lambda pair: pair[0])]

    # At a landing.

    def prepare(self, fragment: Fragment, rules: Rules, refusal: str | None) -> bool:
        """Before a sweep that mixes: see to it that what that takes is there. Collective there.

        Of what has been gathered, all ranks have said before that they can use it. A refusal that
        has come up since is this rank's own matter; the others hear of it with its next ticket.

        Returns:
            Whether no rank of the island has a refusal, so that all may mix.

        Raises:
            RoundError: they are not at the same point, or a rank is gone.
        """
        if fragment.gathered:
            if refusal is not None:
                return False
        elif self._meet(refusal):
            fragment.drop_gathering()
        else:
            return False
        if fragment.ahead:
            try:
                fragment.offer(rules)
            except Exception as error:  # noqa: BLE001 - rules may raise anything
                self._call.fail_alone(str(error))
            self._put_together(fragment)
        return True

    def complete(self, fragment: Fragment) -> None:
        """Behind such a sweep: write what the ranks have to put together only now."""
        if not fragment.ahead:
            self._put_together(fragment)
            fragment.take_common()

    def land(self, fragment: Fragment, rules: Rules) -> None:
        """A round lands, and none is launched. Collective in the island.

        Raises:
            RoundError: a rank has a refusal, they are not at the same point, or one is gone.
        """
        refusal, gathered = fragment.refusal(), fragment.gathered
        if self.prepare(fragment, rules, refusal):
            fragment.sweep(rules, "mix")
            self.complete(fragment)
        elif gathered:
            assert refusal is not None
            self._call.fail_alone(refusal)
        else:
            self._refuse(refusal)

    def _meet(self, refusal: str | None) -> bool:
        """Whether no rank of the island has a refusal. Collective there."""
        point, refused = self._call.point("a landing"), refusal is not None
        try:
            verdict = Ticket(self._island, self._call.device, point, refused=refused).wait()
        except RuntimeError as error:
            self._fail(str(error))
        if verdict.problem is not None:
            self._fail(verdict.problem)
        return not verdict.refused

    def _refuse(self, refusal: str | None) -> NoReturn:
        """Some rank has a refusal, and every one says what it is."""
        try:
            cause = by_rank(self._island.tell(refusal), self._island.ranks)
        except RuntimeError as error:
            cause = str(error)
        self._fail(cause)

    def _start(self, fragment: Fragment) -> Gathering:
        """Start gathering what lies in the common vectors, unless that is under way."""
        if fragment.gathering is None:
            group = self._links.shares or self._island
            fragment.gathering = Gathering(group, fragment.buckets, fragment.common)
        return fragment.gathering

    def _put_together(self, fragment: Fragment) -> None:
        try:
            self._start(fragment).wait()
        except RuntimeError as error:
            self._fail(str(error))

    def _fail(self, cause: str) -> NoReturn:
        self._call.note_failure_in_island(cause)
        raise self._call.failure() from None


def _is_ready(fragment: Fragment) -> bool:
    if fragment.refusal() is not None:
        # Told at the landing, where the ranks can say why.
        return False
    if fragment.gathering is not None:
        return fragment.gathered
    return fragment.round is None or fragment.round.arrived_well
