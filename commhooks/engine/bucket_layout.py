"""In which buckets DDP reduces gradients, remembered from one process to the next.

DDP lays its buckets out anew after a process's first backward (with ``static_graph`` its second).
Over three or more ranks gloo adds numbers in an order that depends on where in a bucket they lie,
so a process that goes on has to reduce its first gradients in the buckets of the one before it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from commhooks.engine.ready_order import ReadyOrder, provisional_backwards
from commhooks.errors import CheckpointError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket

    from commhooks.engine.communicator import Communicator

__all__ = ["BucketLayout", "Layout"]

Layout = list[list[int]]
"""The numbers of the parameters in every bucket, in order."""

# Backwards of a process whose buckets may still be DDP's provisional ones, at most.
_PROVISIONAL = 2


class BucketLayout:
    """DDP's buckets in this process's first backwards, and those a checkpoint asks for.

    Attributes:
        numbers: the parameters' numbers by their ``id``; known before the layout is asked for.
    """

    def __init__(self) -> None:
        self.numbers: Mapping[int, int] = {}
        self._backwards = 0
        self._buckets: list[Sequence[Tensor]] = []
        self._loaded: Layout | None = None
        self._steps = 0
        self._provisional = 1
        self._parameters: list[Tensor] = []
        self._ddp: weakref.ref[DistributedDataParallel] | None = None
        self._ready: ReadyOrder | None = None

    def attach(
        self, parameters: Iterable[Tensor], ddp: DistributedDataParallel | None = None
    ) -> None:
        """Number the parameters, in an order that is the same in the next process.

        Args:
            parameters: those that DDP reduces.
            ddp: the model, if it is known before its first backward.
        """
        self._parameters = list(parameters)
        self.numbers = {id(parameter): n for n, parameter in enumerate(self._parameters)}
        if ddp is not None:
            self._ddp = weakref.ref(ddp)
            self._provisional = provisional_backwards(ddp)

    def note(self, bucket: GradBucket) -> None:
        """Remember a bucket of the backward under way, while they may still change."""
        if self._backwards <= _PROVISIONAL:
            if bucket.index() == 0:
                self._buckets = []
            self._buckets.append(bucket.parameters())

    def end_backward(self) -> None:
        """The last bucket of a backward has been seen."""
        self._backwards += 1
        if self._loaded or self._backwards == _PROVISIONAL:
            self._stop_watching()

    @property
    def foreign(self) -> bool:
        """Whether the backward under way is to be reduced in other buckets than DDP's own."""
        if self._backwards >= _PROVISIONAL:
            return False
        if self._ready is None:
            return self._loaded is not None
        return self._steps + self._backwards >= self._provisional

    def wanted(self, communicator: Communicator) -> Layout:
        """The buckets to reduce in, once all gradients of the backward are there. Collective."""
        if self._loaded is None and self._ready is not None:
            # As in DDP, the first rank's order holds for all.
            self._loaded = communicator.from_first(self._ready.buckets())
        return self._loaded or self._own

    @property
    def _own(self) -> Layout:
        return [[self.numbers[id(p)] for p in bucket] for bucket in self._buckets]

    def dump(self) -> Layout | None:
        """The layout that the next backward's gradients are reduced in.

        None if not known yet: what DDP makes of its buckets after a run's very first backward.
        The next process then works it out, if it knows the model before its own first backward.
        """
        if self._backwards <= _PROVISIONAL and self._loaded is not None:
            return self._loaded
        return self._own if self._backwards > self._provisional else None

    def check(self, layout: Layout | None) -> None:
        """Refuse a layout of other parameters.

        Raises:
            CheckpointError: it does not hold every parameter once.
        """
        if layout is None:
            return
        if sorted(n for bucket in layout for n in bucket) != list(range(len(self.numbers))):
            raise CheckpointError(
                "The checkpoint's gradient buckets do not hold each of this model's "
                f"{len(self.numbers)} parameters once."
            )

    def load(self, layout: Layout | None, steps: int) -> None:
        """Reduce this process's first gradients in the buckets of the one before.

        Args:
            layout: what that one's :meth:`dump` gave; None if it did not know.
            steps: steps that the run has made.
        """
        self._stop_watching()
        self._loaded = layout
        ddp = self._ddp() if self._ddp is not None else None
        unknown = layout is None and steps > 0 and self._provisional > 0
        if unknown and ddp is not None and not self._backwards:
            self._steps = steps
            self._ready = ReadyOrder(ddp, self._parameters)

    def _stop_watching(self) -> None:
        if self._ready is not None:
            self._ready.close()
            self._ready = None
