"""The library's own process groups: the only file of the engine that starts a collective."""

from __future__ import annotations

import threading
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from commhooks.engine.guards.process_exit import closed_at_exit, landing
from commhooks.engine.network.agreement import by_rank, tell
from commhooks.engine.network.waiting import until
from commhooks.engine.network.whereabouts import operations
from commhooks.engine.network.words import plain
from commhooks.errors import RegistrationError

__all__ = ["PREFIX", "Communicator", "done", "named_group", "open_communicator"]

T = TypeVar("T")

PREFIX = "commhooks-"
"""What the names of the library's groups begin with."""


def done(value: T) -> torch.futures.Future[T]:
    """A future that holds ``value`` already."""
    future: torch.futures.Future[T] = torch.futures.Future()
    future.set_result(value)
    return future


def open_communicator(
    parent: dist.ProcessGroup, owner: object, ranks: Sequence[int] | None = None
) -> Communicator:
    """A private group for ``owner``: one that nobody needs any more, or a new one.

    A group costs threads and open files until ``destroy_process_group``, and a sweep registers
    hundreds of states in one process. Collective over the parent's ranks, and no others.

    Args:
        parent: the group that the ranks are of.
        owner: whose it is.
        ranks: the ranks that this one belongs to, by their global numbers, of several sets that
            share out the parent's; None for all of them.

    Raises:
        RegistrationError: a rank has left, or the ranks wait for one another.
    """
    everyone = dist.get_process_group_ranks(parent)
    ranks = everyone if ranks is None else list(ranks)
    kept = _kept[parent] = [each for each in _kept.get(parent, ()) if not each.closed]
    free = next((each for each in kept if each.free and each.ranks == ranks), None)
    told = tell(parent, (free.name if free else None, f"{PREFIX}{uuid.uuid4().hex}"))
    offers = [told[everyone.index(rank)] for rank in ranks]
    # A rank whose garbage collector came later may not have the same one free yet.
    if free is None or len({offered for offered, _ in offers}) > 1:
        try:
            free = Communicator(parent, ranks, name=offers[0][1])
        except RuntimeError as error:
            raise RegistrationError(
                f"The ranks could not make a process group: {plain(str(error))}"
            ) from error
        kept.append(free)
    free.owner = weakref.ref(owner)
    free.owners += 1
    return free


class Communicator:
    """Collectives over a private group of some ranks, or all, of a process group.

    A group of its own keeps the library's background traffic from reordering or delaying the
    user's collectives, and can be ended with the process (:mod:`commhooks.engine.guards`).

    Groups are kept alive by torch alone, until ``destroy_process_group``. The backend's threads
    hold callbacks, and through them this object, for a moment longer than anybody waits for; were a
    group's last reference among them, a thread of the group would end the group, and abort the
    process by waiting for itself.

    Args:
        parent: the group that the ranks are of.
        ranks: those that take part, by their global numbers; this one is among them.
        name: of the new group, the same on every rank and used once.

    Attributes:
        size: number of ranks.
        rank: this rank's number in the group.
        ranks: global numbers of the group's ranks.
        idle: whether nothing is in flight, so that another state can take the group over.
        owner: whose it is; another can have it once the owner is gone.
        owners: how many have had it.
    """

    def __init__(self, parent: dist.ProcessGroup, ranks: Sequence[int], name: str) -> None:
        self._parent = weakref.ref(parent)
        self.name = name
        self.ranks = list(ranks)
        self.size = len(self.ranks)
        self.rank = self.ranks.index(dist.get_rank())
        self.idle = True
        self.owner: Callable[[], object | None] = lambda: None
        self.owners = 0
        self._backend = _backend(parent)
        self._own: weakref.ref[dist.ProcessGroup] | None = None
        if self.size > 1:
            own = named_group(self.ranks, like=parent, name=name)
            self._own = weakref.ref(own)
            closed_at_exit.add(self)

    @property
    def closed(self) -> bool:
        """Whether its group has been ended."""
        return self.size > 1 and (self._own is None or self._own() is None)

    @property
    def free(self) -> bool:
        """Whether its owner is gone and has left nothing behind."""
        return self.idle and not self.closed and self.owner() is None

    @property
    def parent(self) -> dist.ProcessGroup:
        """The group that the ranks are of.

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
        return self._future(work, tensor)

    def broadcast(self, tensor: Tensor, source: int = 0) -> torch.futures.Future[Any]:
        """Start overwriting ``tensor`` with that of the rank with this number in the group."""
        if self._own is None:
            return done([tensor])
        with _unrecorded():
            group = _alive(self._own)
            work = dist.broadcast(tensor, group=group, group_src=source, async_op=True)
        return self._future(work, tensor)

    def all_to_all(self, received: Tensor, sent: Tensor) -> torch.futures.Future[Any]:
        """Start sending row i to rank i, and receiving row i from it."""
        return self._start(dist.all_to_all_single, received, sent)

    def all_gather(self, gathered: Tensor, mine: Tensor) -> torch.futures.Future[Any]:
        """Start gathering every rank's vector, rank i's in row i."""
        return self._start(dist.all_gather_single, gathered, mine)

    def _start(
        self, collective: Callable[..., dist.Work], received: Tensor, sent: Tensor
    ) -> torch.futures.Future[Any]:
        assert self._own is not None
        with _unrecorded():
            group = _alive(self._own)
            work = collective(received.view(-1), sent.view(-1), group=group, async_op=True)
        return self._future(work, received)

    def tell(self, mine: T) -> list[T]:
        """Every rank's value, in the order of the ranks. Blocks."""
        return [mine] if self._own is None else tell(_alive(self._own), mine)

    @property
    def begun(self) -> int:
        """How many collectives this rank has begun here; 0 where nobody counts."""
        if self._own is None or self._backend != "gloo":
            return 0
        return operations(_alive(self._own))

    def meet(self, landed: threading.Event, number: int, words: str) -> None:
        """Wait until all ranks have come to this collective, see :func:`~.waiting.until`."""
        until(landed, self._own() if self._own is not None and number else None, number, words)

    def post(self, subject: str, text: str) -> None:
        """Leave word for the other ranks, who read it once they know that it is there."""
        distributed_c10d._get_default_store().set(self._posted(subject, dist.get_rank()), text)

    def read(self, subject: str, ranks: Sequence[int]) -> str:
        """What the ranks with these global numbers have posted, each with its rank."""
        return by_rank(self._texts(subject, ranks), ranks)

    def told(self, subject: str, text: str, seconds: float) -> list[str] | None:
        """What every rank has posted on ``subject``, this one ``text``; None if not all have yet.

        Args:
            subject: used once.
            text: this rank's word.
            seconds: how long the others are waited for.
        """
        self.post(subject, text)
        keys = [self._posted(subject, rank) for rank in self.ranks]
        try:
            distributed_c10d._get_default_store().wait(keys, timedelta(seconds=seconds))
        except RuntimeError:
            return None
        return self._texts(subject, self.ranks)

    def _texts(self, subject: str, ranks: Sequence[int]) -> list[str]:
        store = distributed_c10d._get_default_store()
        return [store.get(self._posted(subject, rank)).decode() for rank in ranks]

    def _posted(self, subject: str, rank: int) -> str:
        return f"{self.name}/{self.owners}/{subject}/{rank}"

    def _future(self, work: dist.Work, tensor: Tensor) -> torch.futures.Future[Any]:
        future: torch.futures.Future[Any] = work.get_future()
        if tensor.device.type == "cuda" and self._stages_on_host:
            return future.then(landing(_copied_back(work)))
        return future

    @property
    def _stages_on_host(self) -> bool:
        """Whether the backend copies CUDA tensors to the host and back, as gloo does."""
        return self._backend == "gloo" or "cuda:gloo" in self._backend

    def close(self) -> None:
        """End the group and its threads; nothing may be in flight, on any rank."""
        group = self._own() if self._own is not None else None
        if group is not None and dist.is_initialized():
            dist.destroy_process_group(group)
        self._own = None

    def close_at_exit(self) -> None:
        """End what would outlive the interpreter."""
        # NCCL's threads run no Python, and ending its groups takes all ranks.
        if self._backend == "gloo":
            self.close()


# torch keeps the groups; these are kept to be used again.
_kept: weakref.WeakKeyDictionary[dist.ProcessGroup, list[Communicator]] = (
    weakref.WeakKeyDictionary()
)


def named_group(ranks: list[int], *, like: dist.ProcessGroup, name: str) -> dist.ProcessGroup:
    """As ``dist.new_group`` over ``ranks`` alone, under a name that they have agreed on.

    ``new_group(use_local_synchronization=True)`` names a group by how many groups the process
    belongs to. Where that differs between the ranks (a pipeline's embedding group, say), they look
    for one another under different names and wait until they time out.
    """
    backend = _backend(like)
    timeout = _timeout(like)
    group, _ = distributed_c10d._new_process_group_helper(
        len(ranks),
        ranks.index(dist.get_rank()),
        ranks,
        backend,
        distributed_c10d._get_default_store(),
        distributed_c10d.GroupName(name),
        timeout=timeout or distributed_c10d._get_default_timeout(dist.Backend(backend)),
        group_desc="commhooks",
    )
    own: dist.ProcessGroup = group
    distributed_c10d._world.pg_group_ranks[own] = {each: n for n, each in enumerate(ranks)}
    return own


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
