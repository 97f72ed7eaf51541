"""Which ranks make one worker, and which average their parameters with one another."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist

from commhooks.engine.network.agreement import tell
from commhooks.errors import RegistrationError

__all__ = ["Layout", "island_of", "lay_out", "settle_layout", "workers_of"]

Island = Literal["node"] | int | dist.ProcessGroup | None
"""What a user says of islands."""


@dataclass(frozen=True)
class Layout:
    """The ranks, island by island.

    An island is one worker: its ranks average their gradients at every step and hold the same
    parameters. Each of them averages its share of those with its peers, the ranks at the same place
    in the other islands::

                        place 0   place 1
        island 0         rank 0 --- rank 1      gradients, at every step
                            |          |
        island 1         rank 2 --- rank 3
                         parameters, every tau steps

    Attributes:
        islands: global numbers of the ranks, in the order of the islands' first ranks.
        rank: the number of this one.
    """

    islands: tuple[tuple[int, ...], ...]
    rank: int

    @property
    def m(self) -> int:
        """The number of islands, and so of workers."""
        return len(self.islands)

    @property
    def size(self) -> int:
        """The number of ranks in an island."""
        return len(self.islands[0])

    @property
    def mine(self) -> tuple[int, ...]:
        """This rank's island."""
        return next(island for island in self.islands if self.rank in island)

    @property
    def place(self) -> int:
        """This rank's place in its island, from 0."""
        return self.mine.index(self.rank)

    @property
    def peers(self) -> tuple[int, ...]:
        """The ranks at the same place, this one among them."""
        return tuple(island[self.place] for island in self.islands)


def workers_of(
    island: Island, group: dist.ProcessGroup | None, environment: Mapping[str, str] = os.environ
) -> int:
    """How many workers there will be, as far as this rank can know before registration.

    Args:
        island: as for :func:`island_of`.
        group: all ranks that train together; None for the world, which may not be there yet.
        environment: where ``"node"`` and a world that is not there yet are looked for.
    """
    if group is not None:
        ranks = group.size()
    elif dist.is_initialized():
        ranks = dist.get_world_size()
    else:
        ranks = int(environment.get("WORLD_SIZE", 1))
    if isinstance(island, dist.ProcessGroup):
        size = island.size()
    elif island == "node":
        size = int(environment.get("LOCAL_WORLD_SIZE", 1))
    else:
        size = int(island or 1)
    return max(1, ranks // size)


def island_of(
    island: Island, group: dist.ProcessGroup, environment: Mapping[str, str] = os.environ
) -> tuple[int, ...]:
    """The global numbers of the ranks in this rank's island.

    Args:
        island: ``"node"``, a number of neighbouring ranks, the rank's own group, or None for an
            island of one rank.
        group: all ranks that train together.
        environment: where ``"node"`` looks for LOCAL_WORLD_SIZE and LOCAL_RANK, which torchrun and
            ``accelerate launch`` set.

    Raises:
        RegistrationError: there is no such island.
    """
    ranks = dist.get_process_group_ranks(group)
    if isinstance(island, dist.ProcessGroup):
        mine = tuple(dist.get_process_group_ranks(island))
        if dist.get_rank() not in mine or not set(mine) <= set(ranks):
            raise RegistrationError(
                f"island is a process group of the ranks {list(mine)}; it must hold this rank, "
                f"{dist.get_rank()}, and none that does not train this model ({ranks} do)."
            )
        return mine
    position = ranks.index(dist.get_rank())
    size, place = island or 1, 0
    if size == "node":
        size, place = _local("LOCAL_WORLD_SIZE", environment), _local("LOCAL_RANK", environment)
        if not 0 <= place < size:
            raise RegistrationError(
                f'island="node" found LOCAL_RANK={place} and LOCAL_WORLD_SIZE={size}; a launcher '
                "sets the first below the second."
            )
    else:
        place = position % size
    if len(ranks) % size:
        raise RegistrationError(
            f"island={island!r} makes islands of {size} ranks, which does not divide the "
            f"{len(ranks)} ranks that train this model."
        )
    first = position - place
    if first < 0 or first + size > len(ranks):
        raise RegistrationError(
            f'island="node" found LOCAL_RANK={place} on rank {dist.get_rank()}, so that its '
            f"machine's ranks would not follow one another among {ranks}; give every rank its "
            "island as a process group."
        )
    return tuple(ranks[first : first + size])


def settle_layout(group: dist.ProcessGroup, mine: Sequence[int]) -> Layout:
    """The ranks' islands, put together. Collective.

    Args:
        group: all ranks that train together.
        mine: this rank's island, see :func:`island_of`.

    Raises:
        RegistrationError: on every rank, if two of an island name different ranks, or islands
            differ in size.
    """
    ranks = dist.get_process_group_ranks(group)
    return lay_out(dict(zip(ranks, tell(group, tuple(mine)), strict=True)))


def lay_out(named: Mapping[int, tuple[int, ...]]) -> Layout:
    """The islands that all ranks have named, if they fit together.

    Args:
        named: every rank's island, by global numbers.

    Raises:
        RegistrationError: two of an island name different ranks, or islands differ in size.
    """
    for rank, island in named.items():
        for other in island:
            if named.get(other) != island:
                raise RegistrationError(
                    f"The ranks disagree on their islands: rank {rank} says {list(island)}, rank "
                    f"{other} says {list(named.get(other, ()))}."
                )
    islands = tuple(dict.fromkeys(named.values()))
    if len({len(island) for island in islands}) > 1:
        raise RegistrationError(
            "All islands must have the same number of ranks, and these do not: "
            f"{', '.join(str(list(island)) for island in islands)}."
        )
    return Layout(islands, dist.get_rank())


def _local(name: str, environment: Mapping[str, str]) -> int:
    value = environment.get(name, "")
    if not value.isdigit():
        raise RegistrationError(
            f'island="node" needs {name} in the environment, where torchrun and accelerate launch '
            f"put it, and found {value!r}; start the ranks with one of them, or say how many ranks "
            "make an island, island=8."
        )
    return int(value)
