"""The consensus model: the mean over ranks of their local models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from commhooks.engine.guards.interrupts import uninterrupted
from commhooks.engine.network.communicator import Communicator
from commhooks.engine.vectors.buckets import Bucket
from commhooks.engine.vectors.buffers import Buffer, BufferExchange
from commhooks.engine.vectors.devices import catch_up_with_callbacks

__all__ = ["Consensus"]


class Consensus:
    """Replaces parameters and buffers by what all ranks hold in common, and puts them back.

    Making one copies what will be sent; whatever goes wrong in that is this rank's own trouble, and
    the others have not been sent anything yet.

    Args:
        buckets: the parameters; none if they are the same on all ranks.
        communicator: the ranks.
    """

    def __init__(self, buckets: Sequence[Bucket], communicator: Communicator) -> None:
        self._buckets = list(buckets)
        self._communicator = communicator
        self._swapped: list[tuple[Bucket, Tensor]] = []
        self._buffers: BufferExchange | None = None
        self._flats: list[Tensor] = []
        for bucket in self._buckets:
            flat = torch.empty(bucket.numel, dtype=bucket.dtype, device=bucket.device)
            bucket.gather(flat)
            # Divided before the sum, which then overflows where a number does.
            self._flats.append(flat.mul_(1.0 / communicator.size))

    def take_in(self, buffers: Sequence[Buffer], device: torch.device) -> None:
        """Copy the buffers that take part, too."""
        self._buffers = BufferExchange(buffers, device, self._communicator.size)

    def exchange(self) -> int:
        """Send, and wait for what the others send. Collective; nothing has changed afterwards.

        Returns:
            The number of bytes that were sent.

        Raises:
            RuntimeError: the communication failed.
        """
        assert self._buffers is not None
        sums = [flat for flat in (*self._flats, *self._buffers.sums.values()) if flat.numel()]
        if self._communicator.size == 1:
            return 0
        with record_function("commhooks::consensus"):
            futures: list[torch.futures.Future[Any]] = [
                self._communicator.all_reduce(flat) for flat in sums
            ]
            if self._buffers.first.numel():
                futures.append(self._communicator.broadcast(self._buffers.first))
            for future in futures:
                future.wait()
            for bucket in self._buckets:
                catch_up_with_callbacks(bucket.device)
        return sum(bucket.nbytes for bucket in self._buckets) + self._buffers.nbytes

    def put_in_place(self) -> None:
        """Replace the numbers; if it fails, nothing has changed."""
        assert self._buffers is not None
        try:
            with torch.no_grad():
                for bucket, flat in zip(self._buckets, self._flats, strict=True):
                    bucket.swap(flat)
                    self._swapped.append((bucket, flat))
            self._buffers.replace()
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Put this rank's own numbers back, bit for bit."""
        with uninterrupted(), torch.no_grad():
            while self._swapped:
                bucket, flat = self._swapped.pop()
                bucket.swap(flat)
            if self._buffers is not None:
                self._buffers.put_back()
