"""The library's own process group: the only file of the engine that starts a collective."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from commhooks.engine.exit_guard import closed_at_exit

__all__ = ["Communicator", "done"]

T = TypeVar("T")


def done(value: T) -> torch.futures.Future[T]:
    """A future that holds ``value`` already."""
    future: torch.futures.Future[T] = torch.futures.Future()
    future.set_result(value)
    return future


class Communicator:
    """Collectives over a private copy of a process group.

    A group of its own keeps the library's background traffic from reordering or delaying the
    user's collectives. Making it is collective over the parent's ranks alone.

    Args:
        parent: the group whose ranks take part.

    Attributes:
        parent: that group; gradients are averaged over it, as plain DDP does.
        size: number of ranks m.
        rank: this rank's number in the group.
        ranks: global numbers of the group's ranks.
    """

    def __init__(self, parent: dist.ProcessGroup) -> None:
        self.parent = parent
        self.ranks = dist.get_process_group_ranks(parent)
        self.size = len(self.ranks)
        self.rank = dist.get_rank(parent)
        self._backend = _backend(parent)
        self._group: dist.ProcessGroup | None = None
        if self.size > 1:
            # Members alone call this, so that DDP over a subgroup works as well.
            self._group = dist.new_group(
                self.ranks,
                timeout=_timeout(parent),
                backend=self._backend,
                use_local_synchronization=True,
                group_desc="commhooks",
            )
            closed_at_exit.add(self)

    def all_reduce(self, tensor: Tensor) -> torch.futures.Future[Any]:
        """Start summing ``tensor`` over the ranks in place; the future ends when it is done."""
        if self._group is None:
            return done([tensor])
        with _unrecorded():
            work = dist.all_reduce(tensor, group=self._group, async_op=True)
        return work.get_future()  # type: ignore[no-any-return]

    def all_reduce_gradients(self, tensor: Tensor) -> torch.futures.Future[Any]:
        """The same on the model's own group, where plain DDP reduces its gradients."""
        if self.size == 1:
            return done([tensor])
        work = dist.all_reduce(tensor, group=self.parent, async_op=True)
        return work.get_future()  # type: ignore[no-any-return]

    def from_first(self, value: T) -> T:
        """The first rank's ``value``, on every rank. Collective; blocks."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self.parent, group_src=0)
        return values[0]

    def close(self) -> None:
        """End the group's threads, at the end of the process; nothing may be in flight."""
        group, self._group = self._group, None
        # NCCL's threads run no Python, and ending its groups takes all ranks.
        if group is not None and self._backend == "gloo" and dist.is_initialized():
            dist.destroy_process_group(group)


@contextmanager
def _unrecorded() -> Iterator[None]:
    """Keep what starts inside the block out of this thread's profile.

    torch's profiler writes to memory that it has freed when something that it recorded the start
    of ends after the profile, as a background all-reduce may.
    """
    if not torch._C._autograd._profiler_enabled():
        yield
        return
    torch._C._autograd._enable_record_function(False)
    try:
        yield
    finally:
        torch._C._autograd._enable_record_function(True)


def _timeout(group: dist.ProcessGroup) -> timedelta | None:
    """The parent's timeout, which torch has no public way to read; None for torch's default."""
    for device in ("cpu", "cuda"):
        try:
            timeout: timedelta = group._get_backend(torch.device(device)).options._timeout
            return timeout
        except (AttributeError, RuntimeError):
            continue
    return None


def _backend(group: dist.ProcessGroup) -> str:
    """What ``new_group`` takes to make a group of the same kind."""
    config = dist.get_backend_config(group)
    names = {part.rpartition(":")[2] for part in config.split(",")}
    # torch warns at the end of a group that was made with a backend a device, needed or not.
    return names.pop() if len(names) == 1 else config
