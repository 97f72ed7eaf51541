"""The library's own process group: the only file of the engine that starts a collective."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from commhooks.engine.guards.process_exit import closed_at_exit, landing

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
    user's collectives, and can be ended with the process (:mod:`commhooks.engine.guards`). Making
    it is collective over the parent's ranks alone.

    Groups are kept alive by torch alone, until ``destroy_process_group``. The backend's threads
    hold callbacks, and through them this object, for a moment longer than anybody waits for; were a
    group's last reference among them, a thread of the group would end the group, and abort the
    process by waiting for itself.

    Args:
        parent: the group whose ranks take part.

    Attributes:
        size: number of ranks m.
        rank: this rank's number in the group.
        ranks: global numbers of the group's ranks.
    """

    def __init__(self, parent: dist.ProcessGroup) -> None:
        self._parent = weakref.ref(parent)
        self.ranks = dist.get_process_group_ranks(parent)
        self.size = len(self.ranks)
        self.rank = dist.get_rank(parent)
        self._backend = _backend(parent)
        self._own: weakref.ref[dist.ProcessGroup] | None = None
        if self.size > 1:
            # Members alone call this, so that DDP over a subgroup works as well.
            own = dist.new_group(
                self.ranks,
                timeout=_timeout(parent),
                backend=self._backend,
                use_local_synchronization=True,
                group_desc="commhooks",
            )
            self._own = weakref.ref(own)
            closed_at_exit.add(self)

    @property
    def parent(self) -> dist.ProcessGroup:
        """The group that this one is a copy of.

        Raises:
            RuntimeError: it has been destroyed.
        """
        return _alive(self._parent)

    def all_reduce(self, tensor: Tensor) -> torch.futures.Future[Any]:
        """Start summing ``tensor`` over the ranks in place; the future ends when it is done."""
        with _unrecorded():
            return self.all_reduce_gradients(tensor)

    def all_reduce_gradients(self, tensor: Tensor) -> torch.futures.Future[Any]:
        """The same where a backward waits for it, so that a profile may show it."""
        if self._own is None:
            return done([tensor])
        work = dist.all_reduce(tensor, group=_alive(self._own), async_op=True)
        future: torch.futures.Future[Any] = work.get_future()
        if tensor.device.type == "cuda" and self._stages_on_host:
            return future.then(landing(_copied_back(work)))
        return future

    @property
    def _stages_on_host(self) -> bool:
        """Whether the backend copies CUDA tensors to the host and back, as gloo does."""
        return self._backend == "gloo" or "cuda:gloo" in self._backend

    def close(self) -> None:
        """End the group's threads, at the end of the process; nothing may be in flight."""
        group = self._own() if self._own is not None else None
        # NCCL's threads run no Python, and ending its groups takes all ranks.
        if group is not None and self._backend == "gloo" and dist.is_initialized():
            dist.destroy_process_group(group)


def _copied_back(work: dist.Work) -> Callable[[torch.futures.Future[Any]], Any]:
    """For a future that ends while the copy to the device is still queued, on a stream it hides."""

    def order(future: torch.futures.Future[Any]) -> Any:
        value = future.value()
        work.synchronize()
        return value

    return order


def _alive(group: weakref.ref[dist.ProcessGroup]) -> dist.ProcessGroup:
    alive = group()
    if alive is None:
        raise RuntimeError(
            "the process group has been destroyed; call finish() and save checkpoints before "
            "torch.distributed.destroy_process_group()."
        )
    return alive


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
