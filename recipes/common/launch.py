"""Start a recipe as recipes/start.py does, and leave no process behind, whatever happens."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from uuid import uuid4

import psutil  # type: ignore[import-untyped]

__all__ = ["MARK", "RECIPES", "LaunchError", "launch", "launch_command"]

RECIPES = Path(__file__).resolve().parent.parent

# Workers and W&B's service lead sessions of their own, so no process group holds them all. They do
# inherit the environment, and this variable in it says which launch they belong to.
MARK = "COMMHOOKS_LAUNCH"
_GRACE = 10.0
# What is killed goes at once, unless the machine is busy.
_DYING = 10.0


class LaunchError(RuntimeError):
    """A launched recipe failed or took too long; says what it printed where that was captured."""


def launch_command(script: Path, arguments: Sequence[str], workers: int) -> list[str]:
    """The command that runs ``script`` in ``workers`` processes of this machine."""
    options = {
        "--num_processes": workers,
        # A free one, so that launches do not get into each other's way.
        "--main_process_port": 0,
    }
    flags = [str(word) for option in options.items() for word in option]
    return [sys.executable, str(RECIPES / "start.py"), *flags, str(script), *arguments]


def launch(
    script: Path,
    arguments: Sequence[str],
    *,
    workers: int,
    capture: bool = False,
    timeout: float | None = None,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    within: Sequence[str] = (),
) -> str:
    """Run a recipe to its end, and return what it printed if ``capture``.

    When it fails, takes longer than ``timeout`` seconds, or this process is interrupted or
    terminated meanwhile, everything the launch started is ended before this function is left.

    Args:
        script: the recipe.
        arguments: its command line.
        workers: number of processes.
        capture: keep output and errors, in one text, instead of showing them.
        timeout: seconds allowed.
        environment: variables to set besides those of this process.
        cwd: folder to run in.
        within: a command that runs the one written behind it, such as that of link.py.

    Raises:
        LaunchError: the recipe exited with another status than 0, or the time was up.
    """
    mark = uuid4().hex
    variables = {
        **os.environ,
        # More threads than cores slow all of them down; PyTorch would start one a core and worker.
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers)),
        **(environment or {}),
        MARK: mark,
    }
    # A file and not a pipe: a process that outlives its launcher would keep a pipe open.
    with tempfile.TemporaryFile("w+", errors="replace") as kept, _terminate_raises(), _reaped(mark):
        process = subprocess.Popen(
            [*within, *launch_command(script, arguments, workers)],
            env=variables,
            cwd=cwd,
            stdout=kept if capture else None,
            stderr=subprocess.STDOUT if capture else None,
            # Out of reach of the terminal's Ctrl-C: this process gets it, and ends the others.
            start_new_session=True,
        )
        try:
            status = process.wait(timeout)
            failure = f"exited with status {status}" if status else None
        except subprocess.TimeoutExpired:
            _stop(process, mark)
            failure = f"was not done after {timeout} s"
        except BaseException:
            _stop(process, mark)
            raise
        kept.seek(0)
        printed = kept.read()
    if failure is not None:
        raise LaunchError(f"{script.name} {failure}\n{printed}".rstrip())
    return printed


def _stop(process: subprocess.Popen[bytes], mark: str) -> None:
    """End the launcher, which ends its workers; then, by force, whoever did not follow."""
    process.terminate()
    _await_end(mark)
    _kill(mark)
    process.wait()


@contextmanager
def _reaped(mark: str) -> Iterator[None]:
    """End what is left of the launch after the block; W&B's service takes a moment to go."""
    try:
        yield
    finally:
        try:
            _await_end(mark)
        finally:
            _kill(mark)


def _await_end(mark: str) -> None:
    deadline = time.monotonic() + _GRACE
    while _members(mark) and time.monotonic() < deadline:
        time.sleep(0.05)


def _kill(mark: str) -> None:
    # Again and again: one may be started while the others are looked up, and none is gone at once.
    deadline = time.monotonic() + _DYING
    while (members := _members(mark)) and time.monotonic() < deadline:
        for member in members:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        time.sleep(0.02)


def _members(mark: str) -> list[psutil.Process]:
    """The processes of a launch that still run."""
    members = []
    for process in psutil.process_iter():
        try:
            alive = process.status() != psutil.STATUS_ZOMBIE
            if alive and process.environ().get(MARK) == mark:
                members.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return members


@contextmanager
def _terminate_raises() -> Iterator[None]:
    """Turn SIGTERM into SystemExit inside the block, so that cleaning up gets its turn."""
    # Only the main thread may set handlers, and only it is interrupted by them.
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
