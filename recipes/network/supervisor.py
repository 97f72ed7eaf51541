"""One process a rank, watched to the end of the last of them."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import IO

__all__ = ["Supervisor"]

# How long ranks may take to end: after the first has failed, and after being told to.
_GRACE_S = 10.0
_POLL_S = 0.05
_TAIL_LINES = 40


class Supervisor:
    """Starts ranks, shows the output of rank 0, and leaves none of them behind.

    The others' output is kept aside, and its end shown when one of them fails.
    """

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._names: list[str] = []
        self._outputs: list[IO[bytes] | None] = []

    def start(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        place: AbstractContextManager[None],
        name: str,
    ) -> None:
        """Start the next rank, or launcher of ranks, while being in ``place``.

        Args:
            command: its words.
            environment: all of its variables.
            place: a context to be in while it starts.
            name: how it is called where it fails.

        Raises:
            OSError: there is no such command.
        """
        # A file and not a pipe: nobody has to read it for the rank to go on.
        output = tempfile.TemporaryFile() if self._processes else None  # noqa: SIM115
        with place:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                # Out of reach of the terminal's Ctrl-C: `stop` tells every rank once.
                start_new_session=True,
            )
        self._processes.append(process)
        self._names.append(name)
        self._outputs.append(output)

    def wait(self, cancelled: Callable[[], bool]) -> int:
        """Wait for all ranks, or until ``cancelled()``; the status of the first that failed."""
        status, failed_at = 0, 0.0
        while any(process.poll() is None for process in self._processes):
            if cancelled():
                return 128 + signal.SIGTERM
            if status and time.monotonic() > failed_at + _GRACE_S:
                return status
            if not status and (status := self._report_failure()):
                failed_at = time.monotonic()
            time.sleep(_POLL_S)
        return status or self._report_failure()

    def stop(self) -> None:
        """End the ranks that still run, gently and then by force."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            running = [process for process in self._processes if process.poll() is None]
            for process in running:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            deadline = time.monotonic() + _GRACE_S
            for process in running:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))

    def _report_failure(self) -> int:
        """The status of a rank that has failed, with the end of what it printed; or 0."""
        for number, process in enumerate(self._processes):
            if process.poll():
                self._show_end(number)
                # A process killed by signal n counts as status 128 + n, as in a shell.
                return process.returncode if process.returncode > 0 else 128 - process.returncode
        return 0

    def _show_end(self, number: int) -> None:
        name = self._names[number]
        sys.stderr.write(f"link: {name} ended with {self._processes[number].returncode}\n")
        if (output := self._outputs[number]) is not None:
            output.seek(0)
            for line in deque(output, maxlen=_TAIL_LINES):
                sys.stderr.write(f"[{name}] {line.decode(errors='replace')}")
        sys.stderr.flush()
