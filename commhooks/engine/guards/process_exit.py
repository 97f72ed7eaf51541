"""A process that exits: let its rounds land and end the backend's threads, while Python lives.

A thread of the backend that asks a dying interpreter for its lock aborts the process ("terminate
called without an active exception"): Python ends the thread there and then, inside a C++ destructor
that must not be left so. It may do so even after its last callback has returned, when it lets go of
the callback itself. And it does so after every collective of anybody's, when it lets go of tensors
that Python knows, and by then the training thread may have gone on to its end: ``wait()`` returns
before. That is why a program of plain DDP aborts once in a while, too, if it ends right after a
collective, and why it is not enough to end the library's own groups: of others, the thread lives as
long as the DDP models that use them.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TypeVar

__all__ = ["closed_at_exit", "landing"]

T = TypeVar("T")
F = TypeVar("F")

# Peers that are alive send their part within this time; those that are not, never do.
_PATIENCE_S = 10.0

# What torch calls the threads that do a group's work, and let go of it.
_GLOO = "pt_gloo_runloop"
# Several looks, since one may meet a thread on its way from one wait to the next.
_LOOKS = 3
_LOOK_S = 0.005


class _Closable(Protocol):
    def close_at_exit(self) -> None: ...


closed_at_exit: weakref.WeakSet[_Closable] = weakref.WeakSet()
"""What has threads of its own, which ``close_at_exit`` joins."""

# One event for every callback that a thread of the backend has still to run.
_airborne: set[threading.Event] = set()


def landing(callback: Callable[[F], T]) -> Callable[[F], T]:
    """``callback``, for a future's ``then``; a process that exits first lets it run."""
    landed = threading.Event()
    _airborne.add(landed)

    def land(future: F) -> T:
        try:
            return callback(future)
        finally:
            _airborne.discard(landed)
            landed.set()

    return land


@atexit.register
def _leave() -> None:
    # Joining a thread that waits for a dead peer would take as long as the group's timeout.
    if all(landed.wait(_PATIENCE_S) for landed in tuple(_airborne)):
        for closable in tuple(closed_at_exit):
            closable.close_at_exit()
    _let_threads_go()


def _let_threads_go() -> None:
    """Wait until the threads of gloo have nothing to do.

    One that waits for the interpreter's lock gets it while this thread sleeps.
    """
    quiet, deadline = 0, time.monotonic() + _PATIENCE_S
    while quiet < _LOOKS and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
        states = _states_of_gloo()
        if not states:
            return
        quiet = quiet + 1 if states == {"S"} else 0


def _states_of_gloo() -> set[str]:
    """Of its threads that do a group's work: S for one that sleeps, R for one that can run."""
    states = set()
    # Elsewhere than on Linux there is nothing like it, and the one sleep has to do.
    for thread in Path("/proc/self/task").glob("*/stat"):
        with suppress(OSError):  # it has just ended
            name, _, rest = thread.read_text().partition(" (")[2].rpartition(") ")
            if name == _GLOO:
                states.add(rest[0])
    return states


def _forget() -> None:
    """A forked child has none of its parent's threads, so nothing lands in it."""
    _airborne.clear()
    closed_at_exit.clear()


os.register_at_fork(after_in_child=_forget)
