"""Waits for other ranks, watched over: where ranks wait for one another, all of them are told.

A rank that waits for ranks that never come would do so until the timeout of the group, of half an
hour by default, and learn nothing of the others. So a thread of each process looks at the store
that the processes have found each other through. Once some rank has waited for seconds, all of them
write there where they are, and those that wait read it. The thread answers for a rank that stands
in a collective of its user's own.

A wait ends in an error only where it is certain that it would never end otherwise, see
:mod:`commhooks.engine.network.deadlock`.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import logging
import os
import threading
import time
import weakref
from dataclasses import asdict
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import FileStore, PrefixStore, Store, TCPStore, distributed_c10d  # type: ignore[attr-defined]

from commhooks.engine.network.deadlock import Awaited, Standing, explained, missing, stuck
from commhooks.engine.network.whereabouts import Rest, look

__all__ = ["until", "watch"]

logger = logging.getLogger("commhooks")

# How long a wait is none of anybody's business; it is looked into again after twice as long.
_PATIENCE_S = 10.0
_RARELY_S = 60.0
# Of looks at the store, and of those at this process itself.
_POLL_S = 2.0
_BEAT_S = 0.25
# After which a rank that waits for one that computes says so.
_WORRIED_S = 60.0
# For the others, to find out too, before the first of them ends its process.
_FAREWELL_S = 10.0
_STORE_TIMEOUT = timedelta(seconds=10)


class _Wait:
    """A wait of the training thread for other ranks.

    Attributes:
        verdict: why it will never end well, once that is known.
        over: whether the others know it, too.
    """

    def __init__(
        self, group: str, number: int | None, ranks: tuple[int, ...], words: str | None
    ) -> None:
        self.group = group
        self.number = number
        self.ranks = ranks
        self.words = words
        self.began = time.monotonic()
        self.next_look = self.began + _PATIENCE_S
        self.worried = False
        self.verdict: str | None = None
        self.over = False


# The one of each thread that waits.
_waits: list[_Wait] = []


def _newest() -> _Wait | None:
    """The wait that this process is in."""
    waits = tuple(_waits)
    return waits[-1] if waits else None


def until(
    landed: threading.Event,
    group: dist.ProcessGroup | None,
    number: int | None = None,
    words: str | None = None,
) -> None:
    """Wait for other ranks.

    Args:
        landed: set when they all have come.
        group: theirs; None where there is nobody to wait for.
        number: of the collective that they come to, an all-reduce, counted on its group; None for
            the newest one there.
        words: what this rank waits in, for people; None for the call of this package.

    Raises:
        RuntimeError: the ranks wait for one another; says where.
    """
    if group is None or landed.is_set():
        landed.wait()
        return
    ranks = tuple(dist.get_process_group_ranks(group))
    wait = _Wait(distributed_c10d._world.pg_names.get(group, ""), number, ranks, words)
    del group
    _waits.append(wait)
    try:
        while not landed.wait(_BEAT_S) and not wait.over:
            pass
        # Also where it has landed, since another rank has left that was told before.
        if wait.verdict is not None:
            raise RuntimeError(wait.verdict)
    finally:
        _waits.remove(wait)


def watch() -> None:
    """Watch over this process until its groups are destroyed.

    The thread that calls this first is taken for the one that trains.
    """
    global _watch
    world = dist.group.WORLD
    if world is None or world.size() == 1:
        return
    if _watch is not None and _watch.of(world):
        return
    store = distributed_c10d._get_default_store()
    inner = store
    while isinstance(inner, PrefixStore):
        inner = inner.underlying_store
    # Others cannot be cloned, or are of one process alone.
    if isinstance(inner, TCPStore | FileStore):
        _watch = _Watch(world, store.clone())  # type: ignore[attr-defined]


class _Watch:
    """Answers for this process when some rank has waited for long, and judges its own waits.

    The keys in the store have the number of the alarm that they belong to. Those that are there
    when the watch begins are of another run (torchrun's restarts keep the store), and are passed
    over.

    Args:
        world: the default group.
        store: a client of its own; one that waits blocks all who share it.
    """

    def __init__(self, world: dist.ProcessGroup, store: Store) -> None:
        self._world = weakref.ref(world)
        self.training = threading.get_ident()
        self._rank = world.rank()
        self._store = store
        store.set_timeout(_STORE_TIMEOUT)
        self._alarm = 0
        # The wait that this rank had at the alarm.
        self._wait: _Wait | None = None
        self._answered = 0.0
        self._standings: dict[int, Standing] = {}
        self._said = ""
        self._rest = Rest()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="commhooks-watch", daemon=True)
        self._thread.start()

    def of(self, world: dist.ProcessGroup) -> bool:
        """Whether it goes on, for this default group."""
        return self._world() is world and self._thread.is_alive()

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join(2 * _STORE_TIMEOUT.total_seconds())

    def _run(self) -> None:
        try:
            while self._raised(self._alarm + 1):
                self._alarm += 1
            polled = time.monotonic()
            while not self._ended.wait(_BEAT_S):
                if dist.group.WORLD is None or dist.group.WORLD is not self._world():
                    return
                if time.monotonic() - polled >= _POLL_S:
                    self._rest.look(self.training)
                    self._poll()
                    polled = time.monotonic()
        except Exception as error:  # noqa: BLE001 - training goes on without
            # Such as where the process that has the store is gone.
            logger.debug("commhooks: the watch over waits has ended: %s", error)
        finally:
            del self._store

    def _poll(self) -> None:
        wait = _newest()
        now = time.monotonic()
        if wait is not None and now >= wait.next_look:
            wait.next_look = now + min(now - wait.began, _RARELY_S)
            self._store.set(self._key("alarm", self._alarm + 1), "")
        self._answer_alarms(wait)
        if self._rank in self._standings:
            # A rank that is slow to answer is to be named, too.
            heard = not self._hear() or time.monotonic() - self._answered >= 3 * _POLL_S
            waiting = stuck(self._standings)
            if self._rank in waiting:
                if heard:
                    self._conclude(waiting)
            elif self._store.check([self._key("verdict", self._alarm)]):
                said = json.loads(self._store.get(self._key("verdict", self._alarm)))
                if self._rank in said["ranks"]:
                    self._say(said["text"])
            elif heard and wait is not None and wait is self._wait:
                self._worry(wait)

    def _raised(self, alarm: int) -> bool:
        return bool(self._store.check([self._key("alarm", alarm)]))

    def _answer_alarms(self, wait: _Wait | None) -> None:
        while self._raised(self._alarm + 1):
            self._alarm += 1
            self._answer(wait)

    def _answer(self, wait: _Wait | None) -> None:
        """Say where this rank is."""
        if wait is None:
            idle = self._rest.seconds >= _PATIENCE_S
            standing = look(self.training, None, None, None, (), idle=idle)
        else:
            standing = look(self.training, wait.words, wait.group, wait.number, wait.ranks)
        if _newest() is not wait:
            # It has gone on while it was looked at.
            standing = Standing(standing.place)
        self._wait = wait
        self._answered = time.monotonic()
        self._standings = {self._rank: standing}
        self._store.set(self._key("standing", self._alarm, self._rank), _packed(standing))
        # Everybody has read that one, or reads this one.
        self._store.delete_key(self._key("standing", self._alarm - 2, self._rank))

    def _hear(self) -> set[int]:
        """Read what the ranks say that this one waits for, and those that they wait for.

        Returns:
            Those that have not said anything yet.
        """
        silent: set[int] = set()
        while asked := self._awaited() - self._standings.keys() - silent:
            for rank in asked:
                key = self._key("standing", self._alarm, rank)
                if self._store.check([key]):
                    self._standings[rank] = _unpacked(self._store.get(key))
                else:
                    silent.add(rank)
        return silent

    def _awaited(self) -> set[int]:
        """The ranks that somebody waits for."""
        awaited = [each.awaited for each in self._standings.values() if each.awaited is not None]
        return {rank for each in awaited for rank in each.ranks}

    def _conclude(self, waiting: dict[int, list[int]]) -> None:
        """This rank will never go on."""
        text = explained(self._standings, waiting)
        concerned = sorted({*waiting, *(other for others in waiting.values() for other in others)})
        self._store.set(
            self._key("verdict", self._alarm), json.dumps({"ranks": concerned, "text": text})
        )
        wait = self._wait
        if wait is None:
            self._say(text)
        else:
            wait.verdict = text
        self._store.set(self._key("told", self._alarm, self._rank), "")
        others = [self._key("told", self._alarm, rank) for rank in waiting]
        deadline = time.monotonic() + _FAREWELL_S
        # Those that wait for these ranks, and are not waited for, ask and find out in the meantime.
        while (now := time.monotonic()) < deadline and (
            now - self._answered < 5 * _POLL_S or not self._store.check(others)
        ):
            if self._ended.wait(_BEAT_S):
                return
            self._answer_alarms(wait)
        self._standings = {}
        _never_end_groups()
        if wait is not None:
            wait.over = True

    def _say(self, text: str) -> None:
        """Log it where nothing can be raised, in torch's code, which ends as the others leave."""
        self._standings = {}
        if text != self._said:
            self._said = text
            logger.error("commhooks: %s", text)

    def _worry(self, wait: _Wait) -> None:
        """Say once whom this rank has waited for, and what they do."""
        seconds = time.monotonic() - wait.began
        standing = self._standings[self._rank]
        if wait.worried or seconds < _WORRIED_S:
            return
        wait.worried = True
        silent = [rank for rank in wait.ranks if rank not in self._standings]
        late = missing(standing.awaited, self._standings) if standing.awaited else []
        where = [f"rank {rank}, which is {self._standings[rank].place}" for rank in late]
        where += [
            f"rank {rank}, which has not answered, and may have registered no state"
            for rank in silent
        ]
        if where:
            logger.warning(
                "commhooks: rank %d is %s and has waited for %.0f seconds for %s. It goes on as "
                "soon as they come. Call what is collective on every rank.",
                self._rank,
                standing.place,
                seconds,
                "; ".join(where),
            )

    @staticmethod
    def _key(subject: str, alarm: int, rank: int | None = None) -> str:
        return f"commhooks/{subject}/{alarm}" + ("" if rank is None else f"/{rank}")


def _packed(standing: Standing) -> str:
    return json.dumps(asdict(standing))


def _unpacked(text: bytes) -> Standing:
    said = json.loads(text)
    awaited = said["awaited"]
    return Standing(
        said["place"],
        None if awaited is None else Awaited(**{**awaited, "ranks": tuple(awaited["ranks"])}),
        said["begun"],
        {
            group: {int(number): kind for number, kind in kinds.items()}
            for group, kinds in said["kinds"].items()
        },
    )


def _never_end_groups() -> None:
    """Let this process exit though collectives wait in it.

    The end of a group joins its threads. These wait for other ranks, which wait for this process to
    leave. What has a reference too many is not ended along with the interpreter.
    """
    for group in list(distributed_c10d._world.pg_map):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


_watch: _Watch | None = None


@atexit.register
def _leave() -> None:
    # A thread that asks a dying interpreter for its lock aborts the process.
    if _watch is not None:
        _watch.close()


def _forget() -> None:
    """A forked child has none of its parent's threads."""
    global _watch
    _watch = None
    _waits.clear()


os.register_at_fork(after_in_child=_forget)
