"""The parent's side: starts the ranks of a task, collects their ends, kills what remains.

The ranks are forked from a fork server that has imported torch, so that a fresh process costs
tens of milliseconds; it ends with the test session, and every rank ends with it.
"""

import contextlib
import multiprocessing
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple

from tests.harness.limits import scaled
from tests.harness.outcome import Outcome, RankDied, RankStuck, values_or_raise
from tests.harness.worker import DUMP_SIGNAL, Task, work

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

TIMEOUT = 60.0
# For the others, once a rank has failed.
GRACE = 3.0
# For threads and sockets, once the process group is gone.
PATIENCE = 3.0

_context = multiprocessing.get_context("forkserver")
_preloaded = ["tests.harness.preloaded"]
_context.set_forkserver_preload(_preloaded)


def preload(module: str) -> None:
    """Have the fork server import ``module`` as well, unless it runs already.

    For the top of a file whose ranks would take long to import it.
    """
    if module not in _preloaded:
        _preloaded.append(module)
    _context.set_forkserver_preload(_preloaded)


def run_ranks(
    fn: Callable[[*Ts], T],
    world_size: int,
    *args: *Ts,
    timeout: float = TIMEOUT,
    group_timeout: float | None = None,
    initialise: bool = True,
    tidy: bool = True,
) -> list[T]:
    """What ``fn(*args)`` returned on each rank of a gloo group of ``world_size`` processes.

    ``fn`` is a module-level function. ``timeout`` seconds bound the whole task,
    ``group_timeout`` (the same by default) each collective; both are for an idle machine, and
    longer on a busy one (`tests.harness.limits`). With ``initialise=False`` there is
    no process group; with ``tidy=False`` the task may leave threads behind. Raises `RanksFailed`
    with every rank's traceback when one raised, and with the stacks of the others when they then
    did not end within a few seconds.
    """
    task = _tasks(fn, args, world_size, group_timeout or timeout, initialise, tidy)
    return values_or_raise(run_tasks(task, world_size, scaled(timeout), grace=scaled(GRACE)))


def rank_outcomes(
    fn: Callable[[*Ts], T],
    world_size: int,
    *args: *Ts,
    timeout: float = TIMEOUT,
    group_timeout: float | None = None,
    initialise: bool = True,
    tidy: bool = True,
) -> list[Outcome[T]]:
    """As `run_ranks`, for tasks that are to fail: each rank's value or error."""
    task = _tasks(fn, args, world_size, group_timeout or timeout, initialise, tidy)
    return run_tasks(task, world_size, scaled(timeout), grace=scaled(timeout))


def _tasks(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    world_size: int,
    group_timeout: float,
    initialise: bool,
    tidy: bool,
) -> Callable[[Path, int], Task]:
    call = pickle.dumps((fn, args))
    patience = scaled(PATIENCE) if tidy else None
    return lambda folder, rank: Task(
        rank, world_size, call, folder, scaled(group_timeout), initialise, patience
    )


def run_tasks(
    task: Callable[[Path, int], Task],
    world_size: int,
    timeout: float,
    grace: float,
    *,
    daemon: bool = True,
) -> list[Outcome[Any]]:
    """How ``task(folder, rank)`` ended on each rank.

    ``timeout`` seconds bound the task, and as many again what follows it in the processes;
    ``grace`` seconds after the first failure nobody is waited for. A ``daemon`` may have no
    children of Python's multiprocessing. No process is left, however this ends.
    """
    with (
        tempfile.TemporaryDirectory(prefix="ranks-") as folder,
        contextlib.ExitStack() as stack,
    ):
        tasks = [task(Path(folder), rank) for rank in range(world_size)]
        ranks = [stack.enter_context(_process(each, daemon)) for each in tasks]
        first = _collect(ranks, time.monotonic() + timeout, grace)
        for rank, outcome in zip(ranks, first, strict=True):
            if outcome.error is None:
                rank.release()
        second = _collect(
            [r for r, o in zip(ranks, first, strict=True) if o.error is None],
            time.monotonic() + timeout,
            grace,
        )
        failed_late = {outcome.rank: outcome for outcome in second if outcome.error is not None}
        return [failed_late.get(outcome.rank, outcome) for outcome in first]


class _Rank:
    def __init__(self, task: Task, process: ForkServerProcess, pipe: Connection) -> None:
        self.task, self.process, self.pipe = task, process, pipe

    def release(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send_bytes(b"release")

    def reported(self) -> Outcome[Any]:
        """The outcome in the pipe; a closed pipe is a dead process."""
        rank = self.task.rank
        try:
            value, error, details = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):
            self.process.join()
            died = RankDied(f"exit code {self.process.exitcode}")
            return Outcome(rank, None, died, str(died), self._output())
        return Outcome(rank, value, error, details, self._output())

    def stuck(self) -> Outcome[Any]:
        """The outcome of a process that has to be killed: the stacks of all its threads."""
        stack = self._stack()
        self.process.kill()
        self.process.join()
        return Outcome(self.task.rank, None, RankStuck(stack), stack, self._output())

    def _stack(self) -> str:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid or 0, DUMP_SIGNAL)
        text, deadline = "", time.monotonic() + scaled(3.0)
        while time.monotonic() < deadline:  # until the dump has stopped growing
            time.sleep(0.1)
            grown = self.task.stack.read_text() if self.task.stack.exists() else ""
            if grown and grown == text:
                break
            text = grown
        return text or "no stack: the process did not answer"

    def _output(self) -> str:
        return self.task.output.read_text() if self.task.output.exists() else ""


@contextlib.contextmanager
def _process(task: Task, daemon: bool) -> Iterator[_Rank]:
    ours, theirs = _context.Pipe()
    lifeline, held = _context.Pipe(duplex=False)
    process = _context.Process(target=work, args=(task, theirs, lifeline), daemon=daemon)
    process.start()
    theirs.close()
    lifeline.close()
    try:
        yield _Rank(task, process, ours)
    finally:
        process.kill()
        process.join()
        process.close()
        ours.close()
        held.close()


def _collect(ranks: list[_Rank], deadline: float, grace: float) -> list[Outcome[Any]]:
    """One outcome per rank; ``grace`` seconds after the first failure nobody is waited for."""
    outcomes: dict[int, Outcome[Any]] = {}
    pending = {rank.pipe: rank for rank in ranks}
    while pending and (left := deadline - time.monotonic()) > 0:
        for pipe in wait(list(pending), timeout=left):
            assert isinstance(pipe, Connection)
            rank = pending.pop(pipe)
            outcome = outcomes[rank.task.rank] = rank.reported()
            if outcome.error is not None:
                deadline = min(deadline, time.monotonic() + grace)
    for rank in pending.values():
        outcomes[rank.task.rank] = rank.stuck()
    return [outcomes[rank.task.rank] for rank in ranks]
