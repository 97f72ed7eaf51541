"""The consensus model: the mean over ranks of their local models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from commhooks.engine.guards.interrupts import uninterrupted
from commhooks.engine.meter import Meter
from commhooks.engine.network.communicator import Communicator
from commhooks.engine.network.ticket import Ticket
from commhooks.engine.vectors.buckets import Bucket, build_buckets
from commhooks.engine.vectors.devices import Moment, catch_up_with_callbacks

__all__ = ["Consensus", "averageable_buffers"]


def averageable_buffers(ddp: DistributedDataParallel) -> list[Tensor]:
    """The model's floating-point buffers, such as BatchNorm's running statistics.

    Counters stay local, and so does what DDP is told to ignore. A buffer that repeats its memory
    (``expand``) is a constant and cannot be written to.
    """
    return [
        buffer
        for name, buffer in ddp.module.named_buffers()
        if name not in ddp.parameters_to_ignore
        and buffer.is_floating_point()
        and all(
            stride or size == 1 for size, stride in zip(buffer.shape, buffer.stride(), strict=True)
        )
    ]


class Consensus:
    """Replaces parameters and buffers by their means over the ranks, and puts them back.

    Args:
        buckets: the parameters.
        buffers: what else is averaged.
        cap_bytes: size of a bucket of buffers.
    """

    def __init__(
        self, buckets: Sequence[Bucket], buffers: Sequence[Tensor], cap_bytes: float
    ) -> None:
        self._parameters = list(buckets)
        self._buckets = [*buckets, *build_buckets(buffers, cap_bytes)]
        self._own: list[list[Tensor]] = []

    def enter(self, communicator: Communicator, meter: Meter, device: torch.device) -> None:
        """Put the means in place. Collective; a failure puts back what was there.

        Args:
            communicator: the ranks.
            meter: where bytes and seconds are counted.
            device: where the ranks' ticket is made out.

        Raises:
            RuntimeError: the ranks are not at the same point, one holds NaN or inf, or the
                communication failed.
        """
        self._own = [[tensor.detach().clone() for tensor in b.tensors] for b in self._buckets]
        if communicator.size == 1:
            return
        began = Moment(device)
        # Not of the buffers, where -inf may be meant, as in a mask.
        probes = [chunk.x.sum() for bucket in self._parameters for chunk in bucket.gathered()]
        refusal = Ticket(
            communicator, device, consensus=True, number=meter.rounds_launched, probes=probes
        ).wait()
        if refusal is not None:
            raise RuntimeError(refusal)
        try:
            with record_function("commhooks::consensus"):
                for bucket in self._buckets:
                    flat = torch.empty(bucket.numel, dtype=bucket.dtype, device=bucket.device)
                    bucket.gather(flat)
                    # Divided before the sum, which then overflows where a number does.
                    communicator.all_reduce(flat.mul_(1.0 / communicator.size)).wait()
                    catch_up_with_callbacks(bucket.device)
                    meter.bytes_reduced += bucket.nbytes
                    bucket.scatter(flat)
        except BaseException:
            self.leave()
            raise
        ended = Moment(device)
        meter.communication(began, ended, began, ended)

    def leave(self) -> None:
        """Put this rank's own numbers back, bit for bit."""
        with uninterrupted(), torch.no_grad():
            for bucket, own in zip(self._buckets, self._own, strict=False):
                torch._foreach_copy_(bucket.tensors, own)
        self._own = []
