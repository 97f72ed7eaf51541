"""Where a step's gradients are averaged: over all ranks, inside an island, or nowhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from commhooks.engine.guards.refused_backward import after_backward, raise_after_backward
from commhooks.engine.meter import Meter
from commhooks.engine.network.communicator import open_communicator
from commhooks.engine.network.gradients import GradientAverager
from commhooks.engine.network.links import Links
from commhooks.engine.network.roll_call import RollCall

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket

__all__ = ["StepAverager"]


class StepAverager:
    """Averages the gradients of a step, and notes when that fails.

    Gradients have groups of their own, since their buckets and those of parameters differ in size,
    and two ranks that are not at the same point must not make them meet.

    Args:
        links: the ranks.
        call: where they are, and where a failure is noted.
        meter: where bytes and seconds between workers are counted.
        sharded: whether the model averages gradients inside an island by itself.
        inside: whether steps ever are averaged inside the island only.

    Attributes:
        told: what each rank has told with the last backward, by its number.
    """

    def __init__(
        self, links: Links, call: RollCall, meter: Meter, *, sharded: bool, inside: bool
    ) -> None:
        self._links = links
        self._call = call
        self._meter = meter
        self._sharded = sharded
        self.told: Mapping[int, int] = {}
        self._everywhere: GradientAverager | None = None
        self._inside: GradientAverager | None = None
        if links.island is not None and inside and not sharded:
            # Its seconds are not counted: an island is one worker.
            group = open_communicator(links.everyone.parent, self, links.layout.mine)
            self._inside = GradientAverager(links.island, group, Meter())

    def open(self) -> GradientAverager:
        """Make ready to average over all ranks. Collective the first time."""
        if self._everywhere is None:
            everyone = self._links.everyone
            ranks = self._links.layout.peers if self._sharded else None
            group = open_communicator(everyone.parent, self, ranks)
            self._everywhere = GradientAverager(everyone, group, self._meter)
        return self._everywhere

    def average(
        self,
        bucket: GradBucket,
        gradient: torch.futures.Future[Tensor],
        *,
        first: bool,
        last: bool,
        everywhere: bool,
        word: int = 0,
    ) -> torch.futures.Future[Tensor]:
        """Average a bucket of a DDP model over all ranks, or inside the island if there is one.

        If that fails, the failure is noted, and the backward ends in a RoundError.

        Args:
            bucket: the gradients.
            gradient: what to give back where they are not averaged.
            first: whether it is the first of its backward.
            last: whether it is the last.
            everywhere: whether over all ranks.
            word: what this rank tells the others, with the first bucket.
        """
        averager = self.open() if everywhere else self._inside
        if averager is None:
            return gradient
        if not self._call.failed:
            try:
                if first:
                    point = self._call.point("the gradients of a backward")
                    averager.begin(self._call.device, point, word)
                gradient = averager.average(bucket)
                if last:
                    self.told = averager.end(self._call.device)
            except Exception as error:  # noqa: BLE001 - a backend may raise anything
                self._note_failure(averager, str(error))
        if last and self._call.failed:
            raise_after_backward(self._call.failure())
        elif last:
            after_backward(partial(self._check, averager))
        return gradient

    def average_now(self, gradients: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        """Average the shards of gradients over the islands, and wait.

        Args:
            gradients: every parameter's shard, and that of its gradient if it has one.

        Raises:
            RoundError: the ranks are not at the same point, or the communication failed.
        """
        averager = self.open()
        try:
            averager.begin(self._call.device, self._call.point("the gradients of a backward"))
            averager.end(self._call.device)
            averager.average_now(gradients)
        except RuntimeError as error:
            self._call.fail(str(error))

    def settle(self) -> None:
        """Account for the last step's communication, once it is over."""
        if self._everywhere is not None:
            self._everywhere.settle()

    def close(self) -> None:
        """Give back the groups."""
        for averager in (self._everywhere, self._inside):
            if averager is not None:
                averager.close()

    def _check(self, averager: GradientAverager) -> None:
        """Behind a backward, whose last gradients DDP has waited for."""
        try:
            averager.release()
        except RuntimeError as error:
            self._note_failure(averager, str(error))
            raise self._call.failure() from None

    def _note_failure(self, averager: GradientAverager, cause: str) -> None:
        if averager is self._inside:
            self._call.note_failure_in_island(cause)
        else:
            self._call.note_failure(cause)
        averager.give_up()
