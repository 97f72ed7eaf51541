"""The library's groups of one state: over all ranks, between workers, and inside one of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch.distributed as dist

from commhooks.engine.network.communicator import Communicator, open_communicator
from commhooks.engine.network.islands import Layout

__all__ = ["Links"]


class Links:
    """Whom a rank talks to.

    Args:
        parent: all ranks that train together.
        owner: whose the groups are.
        layout: which of them make one worker.
        two_shots: whether what is sent to the peers comes back in a second step.
        background: whether an island gathers what its ranks have computed while they train on.

    Attributes:
        layout: as given.
        everyone: where all ranks meet: tickets and buffers.
        peers: where parameters are averaged between workers.
        back: the peers once more, for second steps, which the ranks may start in another order
            than first ones of other rounds; None where there are none.
        island: where the ranks of one worker meet; None where every rank is a worker.
        shares: the island once more, so that nobody who meets there waits for what is gathered in
            the background; None where nothing is.
    """

    def __init__(
        self,
        parent: dist.ProcessGroup,
        owner: object,
        layout: Layout,
        *,
        two_shots: bool = False,
        background: bool = False,
    ) -> None:
        self.layout = layout
        self.everyone = open_communicator(parent, owner)
        self.peers = self.everyone
        self.island: Communicator | None = None
        self.shares: Communicator | None = None
        if layout.size > 1:
            self.peers = open_communicator(parent, owner, layout.peers)
            self.island = open_communicator(parent, owner, layout.mine)
            if background:
                self.shares = open_communicator(parent, owner, layout.mine)
        self.back = open_communicator(parent, owner, layout.peers) if two_shots else None

    @property
    def all(self) -> list[Communicator]:
        """Every group once."""
        each = (self.everyone, self.peers, self.back, self.island, self.shares)
        return [group for group in dict.fromkeys(each) if group is not None]

    def busy(self) -> None:
        """Something is in flight, so that the groups cannot be given to another state."""
        for each in self.all:
            each.idle = False

    def idle(self) -> None:
        """Nothing is in flight any more."""
        for each in self.all:
            each.idle = True

    def close(self) -> None:
        """End the groups; nothing may be in flight, on any rank."""
        for each in self.all:
            each.close()

    @property
    def teams(self) -> list[list[int]]:
        """The numbers, among all ranks, of those at the same place in their islands."""
        number = self.everyone.ranks.index
        return [[number(rank) for rank in team] for team in zip(*self.layout.islands, strict=True)]

    def peers_differ(self, numbers: Sequence[int | None]) -> bool:
        """Whether some rank's number is not that of its peers; they come in the ranks' order."""
        return any(len({numbers[rank] for rank in team}) > 1 for team in self.teams)

    def apart(self, digests: Sequence[int]) -> str | None:
        """What is wrong where two ranks of an island have different digests.

        Args:
            digests: one a rank, in the order of :attr:`everyone`.
        """
        of = dict(zip(self.everyone.ranks, digests, strict=True))
        found = [island for island in self.layout.islands if len({of[rank] for rank in island}) > 1]
        if not found:
            return None
        named = " and ".join(_odd_ones_out({rank: of[rank] for rank in each}) for each in found)
        return (
            f"the parameters of {named} are no longer the same bit for bit, though they are one "
            "worker. Let all ranks of an island make the same updates: no layer that draws its own "
            "random weights, no parameter that is written to on one rank, no learning rate that "
            "only some have (of a scheduler that has made fewer steps)."
        )


def _odd_ones_out(of: Mapping[int, int]) -> str:
    """The ranks of one island, by name; those that differ from most first, if most agree."""
    (most, count), *_ = Counter(of.values()).most_common()
    if 2 * count <= len(of):
        return f"ranks {list(of)}"
    odd, rest = ([rank for rank in of if (of[rank] == most) == same] for same in (False, True))
    return f"rank(s) {odd} and of the rest of their island, {rest},"
