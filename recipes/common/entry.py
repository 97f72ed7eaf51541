"""How a script that starts other processes is entered and left."""

import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

__all__ = ["enter"]


def enter(main: Callable[[], int]) -> NoReturn:
    """Run ``main`` and exit with its status; when this process is ended, ``main`` is left first."""
    signal.signal(signal.SIGTERM, _leave)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)


def _leave(number: int, frame: FrameType | None) -> None:
    # An exception, so that what main has started is ended too.
    raise SystemExit(128 + number)
