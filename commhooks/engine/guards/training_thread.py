"""Which thread trains. All others may run the model and read figures, but launch nothing."""

from __future__ import annotations

import threading

__all__ = ["TrainingThread"]


class TrainingThread:
    """The thread that collectives are launched from, so that every rank launches the same ones.

    It is the one that has registered the model, until another one steps an optimizer or runs a
    boundary. A backward does not tell: on a GPU, its hooks are called on a thread of autograd's.
    """

    def __init__(self) -> None:
        self._ident = threading.get_ident()

    @property
    def is_this(self) -> bool:
        """Whether this thread is the one."""
        return threading.get_ident() == self._ident

    def move_here(self) -> None:
        """This thread is the one."""
        self._ident = threading.get_ident()
