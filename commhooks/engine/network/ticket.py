"""Before ranks trust a result: are they all at the same point, with finite numbers?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from commhooks.engine.guards.process_exit import landing
from commhooks.engine.network.communicator import Communicator
from commhooks.engine.vectors.devices import HostCopy

__all__ = ["Ticket", "total"]

_POINT, _NUMBER, _NOT_FINITE = range(3)
_POINTS = ("round {}", "averaged() or finish() after round {}")


def total(probes: Sequence[Tensor], device: torch.device) -> Tensor:
    """The sum of scalars of any format, anywhere, in fp64 on ``device``, in few operations."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for probe in probes:
        kinds.setdefault((probe.device, probe.dtype), []).append(probe)
    sums = [torch.stack(same).sum(dtype=torch.float64).to(device) for same in kinds.values()]
    return torch.stack(sums).sum()


class Ticket:
    """A row of numbers from every rank, sent along with whatever it vouches for.

    It always has the same size, so it meets its counterpart even where one rank runs a round and
    another finishes, whose payloads would pair up wrongly or not at all.

    Args:
        communicator: where it is sent.
        device: where the payload lies.
        consensus: whether the payload is the whole model for ``averaged()`` or ``finish()``.
        number: of the round, or of the last one before.
        probes: scalars that are NaN or inf if the rank's parameters are.
    """

    def __init__(
        self,
        communicator: Communicator,
        device: torch.device,
        *,
        consensus: bool,
        number: int,
        probes: list[Tensor],
    ) -> None:
        self._ranks = communicator.ranks
        self._mine = communicator.rank
        # One column a rank and zeros in the others', so that the sum is everybody's row.
        self._slots = torch.zeros(3, communicator.size, dtype=torch.float64, device=device)
        self._slots[_POINT, self._mine] = float(consensus)
        self._slots[_NUMBER, self._mine] = float(number)
        if probes:
            finite = torch.isfinite(total(probes, device))
            self._slots[_NOT_FINITE, self._mine] = (~finite).double()
        self._copy: HostCopy | None = None
        self._future = communicator.all_reduce(self._slots).then(landing(self._fetch))

    def _fetch(self, reduced: torch.futures.Future[Any]) -> Tensor:
        """Runs when the all-reduce ends, on its own stream where there are streams."""
        reduced.value()
        self._copy = HostCopy(self._slots)
        return self._slots

    def wait(self) -> str | None:
        """What forbids to use the payload, if anything.

        Raises:
            RuntimeError: the ticket itself did not get through.
        """
        self._future.wait()
        assert self._copy is not None
        rows = self._copy.read()
        points = [
            _POINTS[int(point)].format(int(number))
            for point, number in zip(rows[_POINT], rows[_NUMBER], strict=True)
        ]
        if any(point != points[self._mine] for point in points):
            where = ", ".join(f"rank {r} at {p}" for r, p in zip(self._ranks, points, strict=True))
            return (
                f"the ranks are not at the same point: {where}. Every rank must take the same "
                "number of steps and call averaged(), finish() and disable() at the same ones; for "
                "uneven inputs use torch.distributed.algorithms.Join([state, ddp_model])."
            )
        broken = [r for r, bad in zip(self._ranks, rows[_NOT_FINITE], strict=True) if bad]
        if broken:
            return f"the parameters of rank(s) {broken} hold NaN or inf."
        return None
