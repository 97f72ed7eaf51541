"""Gradients averaged bucket by bucket, as plain DDP does: warm-up, the control, after disable()."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from commhooks.engine.guards.process_exit import landing
from commhooks.engine.meter import Meter
from commhooks.engine.network.communicator import Communicator, done
from commhooks.engine.network.ticket import Point, Ticket
from commhooks.engine.vectors.devices import Moment

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket

__all__ = ["GradientAverager"]


class GradientAverager:
    """Averages DDP's gradient buckets and accounts for the time it takes.

    A step's communication is in flight from its first bucket's launch to its last one's arrival.
    What lies before the end of the backward is hidden under it; for the rest DDP waits.

    Args:
        tickets: where a backward tells the ranks that it is one; rounds go there too, so that a
            rank that runs something else is found out.
        communicator: where gradients go, which must not meet anything else.
        meter: where bytes and seconds are counted.
    """

    def __init__(self, tickets: Communicator, communicator: Communicator, meter: Meter) -> None:
        self._tickets = tickets
        self.communicator = communicator
        self._meter = meter
        self._ticket: Ticket | None = None
        self._promises: list[_Promise] = []
        self._failures: list[str] = []
        self._first_launch: Moment | None = None
        self._backward_end: Moment | None = None
        self._last_arrival: Moment | None = None

    def begin(self, device: torch.device, point: Point, number: int = 0) -> None:
        """The first bucket of a backward is ready.

        Args:
            device: where tickets are made out.
            point: where this rank is.
            number: something that the others are told, see :meth:`end`.

        Raises:
            RuntimeError: gradients of the last backward did not arrive.
        """
        self.check()
        self.settle()
        self._promises = []
        self._first_launch = Moment(device)
        self._ticket = Ticket(self._tickets, device, point, digest=number)

    def average(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Start averaging a bucket's flat gradient in place."""
        gradient = bucket.buffer()
        if self.communicator.size == 1:
            return done(gradient)
        # Divided before the sum, as DDP's own reducer does, so that the bits are the same.
        gradient.mul_(1.0 / self.communicator.size)
        self._meter.bytes_reduced += gradient.numel() * gradient.element_size()
        reduced = self.communicator.all_reduce_gradients(gradient)
        arrived = reduced.then(landing(self._arrived))
        if gradient.is_cuda:
            # Only the backend's own future carries the stream that DDP has to wait for.
            return arrived
        promise = _Promise(gradient, self._failures)
        self._promises.append(promise)
        arrived.then(landing(promise.keep))
        return promise.future

    def average_now(self, gradients: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        """Average gradients in place, and wait.

        Args:
            gradients: every parameter, and its gradient; one that a rank lacks adds zero.
        """
        if self.communicator.size == 1:
            return
        kinds: dict[torch.dtype, list[tuple[Tensor, Tensor | None]]] = {}
        for parameter, gradient in gradients:
            kinds.setdefault(parameter.dtype, []).append((parameter, gradient))
        for pairs in kinds.values():
            flat = torch.cat(
                [(torch.zeros_like(p) if g is None else g.to(p.dtype)).flatten() for p, g in pairs]
            ).mul_(1.0 / self.communicator.size)
            self._meter.bytes_reduced += flat.numel() * flat.element_size()
            self.communicator.all_reduce_gradients(flat).then(landing(self._arrived)).wait()
            means = torch.split(flat, [parameter.numel() for parameter, _ in pairs])
            for (_, gradient), mean in zip(pairs, means, strict=True):
                if gradient is not None:
                    gradient.copy_(mean.view(gradient.shape))

    def end(self, device: torch.device) -> dict[int, int]:
        """The last bucket has been given to :meth:`average`.

        Returns:
            The number that each rank has begun with, by the rank's own.

        Raises:
            RuntimeError: the ranks are not at the same point, or a rank is gone.
        """
        self.check()
        assert self._ticket is not None
        # Before the ticket is waited for, which is waiting for the other ranks too.
        self._backward_end = Moment(device)
        verdict = self._ticket.wait()
        if verdict.problem is not None:
            raise RuntimeError(verdict.problem)
        return dict(zip(self._tickets.ranks, verdict.digests, strict=True))

    def check(self) -> None:
        """Look whether what has arrived so far has arrived well.

        Raises:
            RuntimeError: it has not.
        """
        if self._failures:
            raise RuntimeError(self._failures[0])

    def release(self) -> None:
        """Behind a backward: keep no gradient alive, whose memory DDP may give back.

        Raises:
            RuntimeError: a gradient has not arrived.
        """
        self.check()
        self._promises = []

    def give_up(self) -> None:
        """Let DDP have the local gradients of a backward whose all-reduces may never end."""
        self.communicator.idle = False
        for promise in self._promises:
            promise.break_()

    def close(self) -> None:
        """Give back the group of the gradients."""
        self.communicator.close()

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


class _Promise:
    """A future for DDP that ends with the all-reduce, or when that has failed or is given up.

    DDP cannot take an error for a tensor: its own message then hides the cause.

    Args:
        gradient: what is averaged.
        failures: where to note what went wrong.
    """

    def __init__(self, gradient: Tensor, failures: list[str]) -> None:
        self.future: torch.futures.Future[Tensor] = torch.futures.Future()
        self._gradient = gradient
        self._failures = failures

    def keep(self, reduced: torch.futures.Future[Tensor]) -> None:
        """Runs on the backend's thread."""
        try:
            reduced.value()
        except Exception as error:  # noqa: BLE001 - a backend may raise anything
            self._failures.append(str(error))
        self.break_()

    def break_(self) -> None:
        """End with whatever the gradient is now."""
        if not self.future.done():
            # The other thread may do the same at the same moment.
            with contextlib.suppress(RuntimeError):
                self.future.set_result(self._gradient)
