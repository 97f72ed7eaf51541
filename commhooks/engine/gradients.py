"""Gradients averaged bucket by bucket, as plain DDP does: warm-up, the control, after disable()."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from commhooks.engine.bucket_layout import BucketLayout, Layout
from commhooks.engine.communicator import Communicator, done
from commhooks.engine.devices import Moment
from commhooks.engine.exit_guard import landing
from commhooks.engine.meter import Meter

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket

__all__ = ["GradientAverager"]


class GradientAverager:
    """Averages DDP's gradient buckets and accounts for the time it takes.

    A step's communication is in flight from its first bucket's launch to its last one's arrival.
    What lies before the end of the backward is hidden under it; for the rest DDP waits.

    Where a checkpoint asks for other buckets than DDP's, all are held back until the last one and
    reduced then; that is so in a process's first two backwards at most.
    """

    def __init__(self, communicator: Communicator, meter: Meter, layout: BucketLayout) -> None:
        self._communicator = communicator
        self._meter = meter
        self._layout = layout
        self._held: dict[int, Tensor] = {}
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
        if self._layout.foreign:
            self._hold(bucket)
            if bucket.is_last():
                self._reduce_held(self._layout.wanted(self._communicator))
            # DDP looks at no bucket before the last one's hook has returned.
            return done(gradient)
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

    def _hold(self, bucket: GradBucket) -> None:
        if bucket.index() == 0:
            self._held = {}
        parameters = bucket.parameters()
        parts = torch.split(bucket.buffer(), [parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            self._held[self._layout.numbers[id(parameter)]] = part

    def _reduce_held(self, layout: Layout) -> None:
        """All-reduce what is held in the buckets of ``layout``, in place."""
        held, self._held = self._held, {}
        device = next(iter(held.values())).device
        began = Moment(device)
        buckets = [[held[number] for number in numbers] for numbers in layout]
        flats = [torch.cat(parts) for parts in buckets]
        futures = [self._communicator.all_reduce_gradients(flat) for flat in flats]
        for parts, flat, future in zip(buckets, flats, futures, strict=True):
            future.wait()
            torch._foreach_copy_(parts, torch.split(flat, [part.numel() for part in parts]))
        ended = Moment(device)
        self._meter.communication(began, ended, began, ended)
