"""Linux network namespaces as open files.

A namespace lasts as long as a process lives in it or a file of it is open. So there is nothing to
name and nothing to delete: whatever ends the process that made it ends the namespace too, and with
the namespace the kernel removes its interfaces.
"""

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["Namespace", "run"]

_CLONE_NEWNET = 0x40000000
# Python 3.12 has os.unshare and os.setns; 3.11 does not.
_libc = ctypes.CDLL(None, use_errno=True)


class Namespace:
    """A new network namespace with a loopback; needs CAP_SYS_ADMIN, and a process of one thread."""

    def __init__(self) -> None:
        with _current() as before:
            _check(_libc.unshare(_CLONE_NEWNET))
            try:
                self._file = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
                run("ip", "link", "set", "lo", "up")
            finally:
                _check(_libc.setns(before, _CLONE_NEWNET))

    @property
    def path(self) -> Path:
        """Where other processes find the namespace, as ``ip link ... netns`` takes it."""
        return Path(f"/proc/{os.getpid()}/fd/{self._file}")

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Be in the namespace inside the block; a process started there stays there."""
        with _current() as before:
            _check(_libc.setns(self._file, _CLONE_NEWNET))
            try:
                yield
            finally:
                _check(_libc.setns(before, _CLONE_NEWNET))


def run(*command: str) -> str:
    """What a command printed.

    Raises:
        RuntimeError: it failed; says with what.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


@contextmanager
def _current() -> Iterator[int]:
    file = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield file
    finally:
        os.close(file)


def _check(status: int) -> None:
    if status:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
