"""Before ranks trust a result: are they all at the same point, with finite numbers?"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from commhooks.engine.guards.process_exit import landing
from commhooks.engine.network.communicator import Communicator
from commhooks.engine.network.report import COLUMNS, Report
from commhooks.engine.vectors.devices import HostCopy

__all__ = ["FIRST_STEP", "Point", "Ticket", "Verdict", "total"]

_CALLS = ("averaged()", "finish()", "disable()", "close()", "drift()")
_JOINING = ("averaged()", "finish()", "disable()", "drift()")
"""Calls in which a rank takes part in what is not due on it yet."""

_STEPS_APART = 3
"""How far others may be ahead of a rank in a call; ``finish()`` waits for all of their steps."""

_ROUND = "a round"
FIRST_STEP = "the first local step"
_KINDS = (
    "the gradients of a backward",
    _ROUND,
    "a landing",
    FIRST_STEP,
    "an error in its island",
    *_CALLS,
)

_ADVICE = (
    "Every rank must make the same number of backwards and the same calls of averaged(), finish(), "
    "disable() and close(). For a batch that is left out, call (loss * 0).backward(); for loaders "
    "of different lengths use torch.distributed.algorithms.Join([state, ddp_model])."
)

# What a number in fp64 holds exactly.
_48_BITS = 2**48 - 1

_SILENT = Report()


@dataclass(frozen=True)
class Point:
    """Where in its run a rank is when it sends something.

    Attributes:
        what: a member of ``_KINDS``.
        step: steps made so far; of a round, the step after which it is due.
        number: rounds launched so far.
    """

    what: str
    step: int
    number: int

    def __str__(self) -> str:
        number = f" {self.number}" if self.what == _ROUND else ""
        return f"{self.what.removeprefix('a ')}{number} after step {self.step}"


@dataclass(frozen=True)
class Verdict:
    """What the ranks' tickets say, the same on every rank.

    Attributes:
        problem: what forbids to use the payload, if anything.
        refused: the ranks that have a reason of their own, which they have to tell the others.
        digests: every rank's.
        reports: every rank's, by its global number.
        joined: the round that some ranks have launched, or the start that they have come to, and
            others, which are in a call, have still to take part in; None if all ranks are at the
            same thing.
        step: the last step of any rank.
    """

    problem: str | None
    refused: tuple[int, ...]
    digests: tuple[int, ...]
    reports: Mapping[int, Sequence[float]]
    joined: Point | None
    step: int

    @property
    def alike(self) -> bool:
        """Whether all ranks describe what they bring with the same digest."""
        return len(set(self.digests)) == 1


class Ticket:
    """A row of numbers from every rank, sent along with whatever it vouches for.

    It always has the same size, so it meets its counterpart even where one rank runs a round and
    another finishes, whose payloads would pair up wrongly or not at all.

    Args:
        communicator: where it is sent.
        device: where the payload lies.
        point: what this rank is about to do.
        probes: scalars that are NaN or inf if the rank's parameters are.
        refused: whether this rank has a reason not to take part.
        digest: a number that stands for what else ranks must have in common, as a scalar tensor
            where the host need not know it; 48 bits made of it are sent.
        report: what else this rank tells.
    """

    def __init__(
        self,
        communicator: Communicator,
        device: torch.device,
        point: Point,
        *,
        probes: Sequence[Tensor] = (),
        refused: bool = False,
        digest: int | Tensor = 0,
        report: Report = _SILENT,
    ) -> None:
        self._ranks = communicator.ranks
        self._communicator, self._words = communicator, str(point)
        self._landed = threading.Event()
        mine = (_KINDS.index(point.what), point.step, point.number, 0, refused, 0)
        # One column a rank and zeros in the others', so that the sum is everybody's row.
        rows = len(mine) + COLUMNS
        self._slots = torch.zeros(rows, communicator.size, dtype=torch.float64, device=device)
        self._slots[: len(mine), communicator.rank] = torch.tensor(mine, dtype=torch.float64)
        if report is not _SILENT:
            self._slots[len(mine) :, communicator.rank] = report.row(device)
        # Folded: the exponent of a number in fp64 lies beyond the last 48 bits.
        self._slots[3, communicator.rank] = (digest ^ (digest >> 16)) & _48_BITS
        if probes:
            finite = torch.isfinite(total(probes, device))
            self._slots[5, communicator.rank] = (~finite).double()
        self._copy: HostCopy | None = None
        self._future = communicator.all_reduce(self._slots).then(landing(self._fetch))
        self._number = communicator.begun

    def _fetch(self, reduced: torch.futures.Future[Any]) -> Tensor:
        """Runs when the all-reduce ends, on its own stream where there are streams."""
        try:
            reduced.value()
            self._copy = HostCopy(self._slots)
        finally:
            self._landed.set()
        return self._slots

    @property
    def done(self) -> bool:
        """Whether it has come back from all ranks."""
        return self._future.done()

    def wait(self) -> Verdict:
        """What the ranks say.

        Raises:
            RuntimeError: the ticket itself did not get through, or never will since ranks wait for
                one another.
        """
        self._communicator.meet(self._landed, self._number, self._words)
        self._future.wait()
        assert self._copy is not None
        kinds, steps, numbers, digests, refused, broken, *reports = self._copy.read().tolist()
        points = [
            Point(_KINDS[int(kind)], int(step), int(number))
            for kind, step, number in zip(kinds, steps, numbers, strict=True)
        ]
        problem = None
        joined = _to_join(points)
        if joined is None and not _compatible(points):
            where = ", ".join(f"rank {r} at {p}" for r, p in zip(self._ranks, points, strict=True))
            problem = f"the ranks are not at the same point: {where}. {_ADVICE}"
        elif any(broken):
            ranks = [r for r, bad in zip(self._ranks, broken, strict=True) if bad]
            problem = f"the parameters of rank(s) {ranks} hold NaN or inf."
        refusing = tuple(r for r, refuses in zip(self._ranks, refused, strict=True) if refuses)
        told = dict(zip(self._ranks, zip(*reports, strict=True), strict=True))
        if joined is not None:
            # Those of a call stand for something else than those of a round.
            pairs = zip(points, digests, strict=True)
            digests = [digest if point == joined else 0 for point, digest in pairs]
        last = max(point.step for point in points)
        return Verdict(problem, refusing, tuple(map(int, digests)), told, joined, last)


def _compatible(points: Sequence[Point]) -> bool:
    """Whether the ranks can do together what they are at.

    A call has one right answer where ranks have made more steps than others, too, as long as they
    have taken part in the same rounds.
    """
    if len({point.what for point in points}) == 1 and points[0].what in _CALLS:
        return len({point.number for point in points}) == 1
    return len(set(points)) == 1


def _to_join(points: Sequence[Point]) -> Point | None:
    """The round or the start that ranks in a call have to take part in first, if there is one.

    A rank that has made fewer steps than others comes to :data:`_JOINING` before a boundary that
    they have run already, or before its first local step. Its model is as old as it is, and goes
    into the round as that.
    """
    ahead = {point for point in points if point.what in (_ROUND, FIRST_STEP)}
    calls = {point for point in points if point.what not in (_ROUND, FIRST_STEP)}
    if len(ahead) != 1 or not calls:
        return None
    (joined,) = ahead
    # A round counts itself.
    launched = joined.number - (joined.what == _ROUND)
    alike = len({point.what for point in calls}) == 1
    near = all(
        point.what in _JOINING
        and point.number == launched
        # A rank that makes a call alone is to be told before the run is over.
        and (point.what == "finish()" or joined.step - point.step <= _STEPS_APART)
        for point in calls
    )
    return joined if alike and near else None


def total(probes: Sequence[Tensor], device: torch.device) -> Tensor:
    """The sum of scalars of any format, anywhere, in fp64 on ``device``, in few operations."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for probe in probes:
        kinds.setdefault((probe.device, probe.dtype), []).append(probe)
    sums = [torch.stack(same).sum(dtype=torch.float64).to(device) for same in kinds.values()]
    return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.float64, device=device)
