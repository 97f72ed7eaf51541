"""Which buckets DDP will make of the order in which a backward's gradients become ready."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

__all__ = ["ReadyOrder", "provisional_backwards"]


def provisional_backwards(ddp: DistributedDataParallel) -> int:
    """How many backwards of a process DDP makes before it lays its buckets out for good."""
    if ddp.static_graph:
        return 2
    return 0 if ddp.find_unused_parameters else 1


class ReadyOrder:
    """Watches the gradients of a process's first backwards.

    DDP packs the gradients of its first backward (with ``static_graph`` its second) in the order
    they became ready, and uses these buckets from the next forward on. A process that goes on from
    a run's very first step needs them a backward earlier, so the packing is repeated here. If
    another version of torch packs otherwise, it costs the last bit of that step.

    Args:
        ddp: the model.
        parameters: those that DDP reduces, in the engine's order.
    """

    def __init__(self, ddp: DistributedDataParallel, parameters: Sequence[Tensor]) -> None:
        self._ddp = weakref.ref(ddp)
        self._parameters = list(parameters)
        self._order: dict[int, None] = {}
        self._handles = [
            parameter.register_post_accumulate_grad_hook(_noting(self._order, number))  # type: ignore[no-untyped-call]
            for number, parameter in enumerate(parameters)
        ]

    def buckets(self) -> list[list[int]] | None:
        """The new buckets, in the last hook of a backward; None if a gradient is missing."""
        ddp = self._ddp()
        if ddp is None or len(self._order) != len(self._parameters):
            return None
        try:
            limits = _limits(ddp)
        except AttributeError:  # they are no part of torch's public interface
            return None
        return pack(self._parameters, list(self._order), limits)

    def close(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()


def _noting(order: dict[int, None], number: int) -> Callable[[Tensor], None]:
    def note(parameter: Tensor) -> None:
        # Micro-batches under no_sync() may have come before; the last backward's order counts.
        order.pop(number, None)
        order[number] = None

    return note


def _limits(ddp: DistributedDataParallel) -> list[int]:
    """The sizes in bytes from which a bucket is full; the last one holds for all that follow."""
    if ddp.bucket_bytes_cap_list:
        return list(ddp.bucket_bytes_cap_list)
    if not ddp.bucket_bytes_cap_default:
        return [ddp.bucket_bytes_cap]
    first: int = dist._DEFAULT_FIRST_BUCKET_BYTES  # type: ignore[attr-defined]
    return [first, ddp.bucket_bytes_cap]


def pack(
    parameters: Sequence[Tensor], order: Sequence[int], limits: Sequence[int]
) -> list[list[int]]:
    """As torch's ``compute_bucket_assignment_by_size``, up to the order of the buckets."""
    full: list[list[int]] = []
    open_: dict[tuple[torch.dtype, torch.device], tuple[list[int], int, int]] = {}
    for number in order:
        parameter = parameters[number]
        kind = parameter.dtype, parameter.device
        bucket, size, limit = open_.pop(kind, ([], 0, 0))
        bucket.append(number)
        size += parameter.numel() * parameter.element_size()
        if size >= limits[limit]:
            full.append(bucket)
            bucket, size, limit = [], 0, min(limit + 1, len(limits) - 1)
        open_[kind] = bucket, size, limit
    return full + [bucket for bucket, _, _ in open_.values() if bucket]
