"""Which ranks wait for one another, from what each of them says: a rule without a network.

A rank that waits for a collective goes on when all ranks that the collective needs have begun it.
If one of these waits too, and so on round a circle, then nobody in it ever goes on, however slow
the network is. A rank that computes is in no circle.

[Note: snapshots] Ranks are looked at one after the other, and a circle is certain all the same. Say
that some rank in it went on after it was looked at, and take the first that did. It went on because
the rank that it waits for began the collective, which that rank had not when it was looked at. So
that rank had gone on before, and the other was not the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Awaited", "Standing", "explained", "missing", "stuck"]

# Collectives that gloo never pairs with one another.
_KINDS = frozenset(
    (
        "all_gather",
        "all_reduce",
        "all_to_all",
        "barrier",
        "broadcast",
        "gather",
        "reduce",
        "scatter",
    )
)


@dataclass(frozen=True)
class Awaited:
    """A collective that a rank has begun and waits for.

    Attributes:
        group: the name of its group.
        number: how many collectives the rank has begun on that group, this one included.
        kind: what it is.
        ranks: the global numbers of those that have to begin it, too.
    """

    group: str
    number: int
    kind: str
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Standing:
    """What a rank says of itself.

    Attributes:
        place: where its code is, for people.
        awaited: what it waits for; None if it does not wait, or if another thread of it might begin
            what others wait for.
        begun: how many operations it has begun on each of its groups, by the group's name.
        kinds: what the newest of its collectives are, by the group's name and their number there.
    """

    place: str
    awaited: Awaited | None = None
    begun: Mapping[str, int] = field(default_factory=dict)
    kinds: Mapping[str, Mapping[int, str]] = field(default_factory=dict)


def missing(awaited: Awaited, standings: Mapping[int, Standing]) -> list[int]:
    """The ranks that have to begin the collective and have not; only those that are known."""
    return [
        rank
        for rank in awaited.ranks
        if rank in standings
        and standings[rank].begun.get(awaited.group, awaited.number) < awaited.number
    ]


def stuck(standings: Mapping[int, Standing]) -> dict[int, list[int]]:
    """The ranks that can never go on, each with those that it waits for in vain."""
    waiting = {
        rank: (missing(each.awaited, standings), _strayed(each.awaited, standings))
        for rank, each in standings.items()
        if each.awaited is not None
    }
    while True:
        free = [
            rank
            for rank, (absent, strayed) in waiting.items()
            if not strayed and waiting.keys().isdisjoint(absent)
        ]
        if not free:
            return {rank: absent + strayed for rank, (absent, strayed) in waiting.items()}
        for rank in free:
            del waiting[rank]


def _strayed(awaited: Awaited, standings: Mapping[int, Standing]) -> list[int]:
    """The ranks that have begun another kind of collective in its place."""
    return [
        rank
        for rank in awaited.ranks
        if rank in standings
        and awaited.kind in _KINDS
        and standings[rank].kinds.get(awaited.group, {}).get(awaited.number)
        in _KINDS - {awaited.kind}
    ]


def explained(standings: Mapping[int, Standing], waiting: Mapping[int, list[int]]) -> str:
    """Who waits where, for those that :func:`stuck` has found."""
    named = sorted({*waiting, *(other for others in waiting.values() for other in others)})
    where = "; ".join(
        f"rank {rank} is {standings[rank].place}"
        + (f" and waits for {_ranks(waiting[rank])}" if rank in waiting else "")
        for rank in named
    )
    return (
        f"ranks wait for one another and would do so for ever: {where}. Every rank must make the "
        "same collective calls in the same order: steps of every model, barriers and other "
        "collectives of your own, register(), averaged(), finish() and the like."
    )


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks}"
