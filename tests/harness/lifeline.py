"""Ties a process's life to the test session's, so that no orphan can exist.

The session holds the only writing end of a pipe and never writes to it. When the session ends,
in whatever way, the kernel closes that end and signals whoever asked to be told; the signal's
default action is to end the process, even one that is stuck in native code.
"""

import fcntl
import os
import select
from multiprocessing.connection import Connection


def die_with_writer_of(lifeline: Connection) -> None:
    """End this process when the other end of ``lifeline`` closes."""
    fd = lifeline.fileno()
    fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([fd], [], [], 0)[0]:  # closed before the request was made
        os._exit(1)
