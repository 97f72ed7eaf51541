"""What of an engine goes into a checkpoint, and what another run can go on from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from commhooks.engine.checkpoint import check_values
from commhooks.engine.meter import Meter
from commhooks.engine.network.links import Links
from commhooks.engine.network.wires import piece_numel
from commhooks.engine.progress import Progress
from commhooks.engine.rounds.fragment import Fragment
from commhooks.engine.rounds.schedule import Cycle
from commhooks.engine.rules import Rules
from commhooks.errors import CheckpointError

__all__ = ["Saving", "Standing"]


@dataclass
class Standing:
    """How far one rank is.

    Attributes:
        step: DDP backwards with gradient sync on, so far.
        origin: the step after which the local steps begin.
        started: whether the vectors mean something.
        drifted: whether a local step was ever made, so that models and optimizers may differ.
        disabled: whether gradients are averaged for good.
    """

    step: int
    origin: int
    started: bool = False
    drifted: bool = False
    disabled: bool = False


_STEPS = ("step", "origin")
_FLAGS = ("started", "drifted", "disabled")


class Saving:
    """Everything of a state that a checkpoint holds.

    Args:
        standing: how far this rank is.
        fragments: the model.
        cycle: when they launch.
        progress: what has been told of losses.
        meter: the counters.
        links: the ranks.
    """

    def __init__(
        self,
        standing: Standing,
        fragments: Sequence[Fragment],
        cycle: Cycle,
        progress: Progress,
        meter: Meter,
        links: Links,
    ) -> None:
        self._standing = standing
        self._fragments = fragments
        self._cycle = cycle
        self._progress = progress
        self._meter = meter
        self._links = links

    @property
    def identity(self) -> dict[str, int]:
        """Which rank of how many this is."""
        everyone, layout = self._links.everyone, self._links.layout
        return {
            "world_size": everyone.size,
            "rank": everyone.rank,
            "island_size": layout.size,
            "place": layout.place,
        }

    def same_ranks(self, saved: Mapping[str, Any]) -> bool:
        """Whether as many ranks saved, in islands as large."""
        mine = self.identity
        return all(saved.get(name) == mine[name] for name in ("world_size", "island_size"))

    def state_dict(self, rules: Rules, *, begins_anew: bool) -> dict[str, Any]:
        """Counters and vectors; nothing may be in flight.

        Args:
            rules: the algorithm.
            begins_anew: whether the vectors mean nothing, since the parameters are other ones now.
        """
        standing = asdict(self._standing)
        standing["started"] &= not begins_anew
        vectors = _saved_vectors(rules) if standing["started"] else None
        return {
            "schedule": {name: standing[name] for name in _STEPS},
            "cycle": self._cycle.state_dict(),
            "losses": self._progress.state_dict(),
            "meter": asdict(self._meter),
            **{name: standing[name] for name in _FLAGS},
            "fragments": [fragment.state_dict(vectors) for fragment in self._fragments],
        }

    def check(self, saved: Mapping[str, Any], rules: Rules) -> None:
        """Refuse what :meth:`load` could not go on from.

        Raises:
            CheckpointError: it is damaged, of another model, or of another share of this one.
        """
        goes_on = saved.get("started") is True and self._goes_on(saved, rules)
        vectors = _saved_vectors(rules) if goes_on else None
        pieces = self._piece_sizes if self.same_ranks(saved) else None
        check_values(saved, self._fragments, vectors, rules, pieces)
        mine = self.identity
        place, size = mine["place"], mine["island_size"]
        other_place = saved["island_size"] == size and saved["place"] != place
        if saved["started"] and rules.portable and other_place:
            # Other ranks of the island would go on where this one starts anew.
            raise CheckpointError(
                f"The dictionary is of a rank at place {saved['place']} of an island of {size}, "
                f"and this rank is at place {place}, with another share of the model. Load that of "
                f"a saved rank at place {place}, such as rank {place}'s."
            )

    def load(self, saved: Mapping[str, Any], rules: Rules) -> bool:
        """Go on from what :meth:`state_dict` gave and :meth:`check` found good.

        Args:
            saved: what it gave, on this rank or, with another number of workers, on any rank that
                had the same share of its island's model.
            rules: the algorithm.

        Returns:
            Whether the vectors go on too. Those that belong to one rank do not fit another number
            of ranks, nor those of another share; the algorithm then starts anew from the
            parameters.
        """
        started = saved["started"] and self._goes_on(saved, rules)
        same_ranks = self.same_ranks(saved)
        for fragment, values in zip(self._fragments, saved["fragments"], strict=True):
            fragment.load_state_dict(values, rules if started else None, residuals=same_ranks)
            # What was in flight is part of the vectors. It lands in models that were in flight with
            # it, which those of another number of workers are not.
            if not same_ranks and not (started and rules.overlapped):
                fragment.schedule.landing = None
        self._cycle.load_state_dict(saved["cycle"])
        self._progress.load_state_dict(saved["losses"])
        flags = {name: saved[name] for name in _FLAGS}
        for name, value in {**saved["schedule"], **flags, "started": started}.items():
            setattr(self._standing, name, value)
        for name, value in saved["meter"].items():
            setattr(self._meter, name, value)
        return started or not saved["started"]

    def _goes_on(self, saved: Mapping[str, Any], rules: Rules) -> bool:
        mine = self.identity
        same_share = all(saved.get(name) == mine[name] for name in ("island_size", "place"))
        return self.same_ranks(saved) or (same_share and rules.portable)

    @property
    def _piece_sizes(self) -> list[list[int]]:
        """For every fragment, how long the residual of each bucket's owned piece is."""
        if self._links.back is None:
            return [[] for _ in self._fragments]
        m = self._links.layout.m
        return [[piece_numel(b.length, m) for b in each.buckets] for each in self._fragments]


def _saved_vectors(rules: Rules) -> tuple[str, ...]:
    """The vectors that mean something between launches and landings."""
    wire = rules.overlapped or rules.reference == "wire"
    return (*rules.vectors, *(("wire",) if wire else ()))
