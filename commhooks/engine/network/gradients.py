"""Gradients averaged bucket by bucket, as plain DDP does: warm-up, the control, after disable()."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from commhooks.engine.guards.process_exit import landing
from commhooks.engine.meter import Meter
from commhooks.engine.network.communicator import Communicator, done
from commhooks.engine.vectors.devices import Moment

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket

__all__ = ["GradientAverager"]


class GradientAverager:
    """Averages DDP's gradient buckets and accounts for the time it takes.

    A step's communication is in flight from its first bucket's launch to its last one's arrival.
    What lies before the end of the backward is hidden under it; for the rest DDP waits.
    """

    def __init__(self, communicator: Communicator, meter: Meter) -> None:
        self._communicator = communicator
        self._meter = meter
        self._first_launch: Moment | None = None
        self._backward_end: Moment | None = None
        self._last_arrival: Moment | None = None

    def average(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Start averaging a bucket's flat gradient in place."""
        if bucket.index() == 0:
            self.settle()
            self._first_launch = Moment(bucket.buffer().device)
        gradient = bucket.buffer()
        if self._communicator.size == 1:
            return done(gradient)
        # Divided before the sum, as DDP's own reducer does, so that the bits are the same.
        gradient.mul_(1.0 / self._communicator.size)
        self._meter.bytes_reduced += gradient.numel() * gradient.element_size()
        future = self._communicator.all_reduce_gradients(gradient).then(landing(self._arrived))
        if bucket.is_last():
            self._backward_end = Moment(gradient.device)
        return future

    def settle(self) -> None:
        """Account for the last step's communication, once it is over."""
        launched, ended, arrived = self._first_launch, self._backward_end, self._last_arrival
        if launched and ended and arrived:
            self._meter.communication(launched, arrived, ended, arrived)
        self._last_arrival = self._backward_end = None

    def _arrived(self, future: torch.futures.Future[Any]) -> Tensor:
        gradient: Tensor = future.value()[0]
        self._last_arrival = Moment(gradient.device)
        return gradient
