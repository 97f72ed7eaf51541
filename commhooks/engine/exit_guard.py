"""A process that exits: let its rounds land and end the backend's threads, while Python lives.

A thread of the backend that asks a dying interpreter for its lock aborts the process. It may do so
even after its last callback has returned, when it lets go of the callback itself.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from typing import Protocol

__all__ = ["airborne", "closed_at_exit"]

# Peers that are alive send their part within this time; those that are not, never do.
_PATIENCE_S = 10.0


class _Closable(Protocol):
    def close(self) -> None: ...


airborne: set[threading.Event] = set()
"""One event for every round in flight, which the round sets and discards when it has landed."""

closed_at_exit: weakref.WeakSet[_Closable] = weakref.WeakSet()
"""What has threads of its own, which ``close`` joins."""


@atexit.register
def _leave() -> None:
    # Joining a thread that waits for a dead peer would take as long as the group's timeout.
    if all(landed.wait(_PATIENCE_S) for landed in tuple(airborne)):
        for closable in tuple(closed_at_exit):
            closable.close()
