"""A process that exits: let its rounds land and end the backend's threads, while Python lives.

A thread of the backend that asks a dying interpreter for its lock aborts the process. It may do so
even after its last callback has returned, when it lets go of the callback itself.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable
from typing import Protocol, TypeVar

__all__ = ["closed_at_exit", "landing"]

T = TypeVar("T")
F = TypeVar("F")

# Peers that are alive send their part within this time; those that are not, never do.
_PATIENCE_S = 10.0


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


def _forget() -> None:
    """A forked child has none of its parent's threads, so nothing lands in it."""
    _airborne.clear()
    closed_at_exit.clear()


os.register_at_fork(after_in_child=_forget)
