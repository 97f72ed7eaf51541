"""What the library logs as a warning."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class _Texts(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextmanager
def logged_warnings() -> Iterator[list[str]]:
    """The texts of all warnings of the package that are logged inside the block."""
    logger, handler = logging.getLogger("commhooks"), _Texts()
    logger.addHandler(handler)
    try:
        yield handler.texts
    finally:
        logger.removeHandler(handler)
