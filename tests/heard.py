"""What the package logs."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def heard() -> Iterator[list[str]]:
    """What the package says inside the block."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    listener = Listener()
    logging.getLogger("commhooks").addHandler(listener)
    try:
        yield lines
    finally:
        logging.getLogger("commhooks").removeHandler(listener)
