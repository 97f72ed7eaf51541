"""The child's side: one task of one rank, in a process of its own."""

import contextlib
import faulthandler
import gc
import os
import pickle
import signal
import sys
import traceback
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.harness.leaks import held, held_beyond
from tests.harness.lifeline import die_with_writer_of
from tests.harness.outcome import ResourcesLeaked

DUMP_SIGNAL = signal.SIGUSR1


@dataclass(frozen=True)
class Task:
    """What one rank is to do.

    ``call`` is the pickled ``(function, args)``; the ranks of a task share its ``folder``. What
    the task leaves behind has ``patience`` seconds to go; without, it may stay.
    """

    rank: int
    world_size: int
    call: bytes
    folder: Path
    group_timeout: float
    initialise: bool
    patience: float | None

    @property
    def output(self) -> Path:
        return self.folder / f"output{self.rank}"

    @property
    def stack(self) -> Path:
        return self.folder / f"stack{self.rank}"


def work(task: Task, pipe: Connection, lifeline: Connection) -> None:
    """Run the task, report ``(value, error, details)``, and leave.

    A rank that returned keeps its process group until the parent releases it, so that no rank
    is surprised by a peer that was merely faster; a rank that raised leaves at once, as a
    crashed trainer does.
    """
    die_with_writer_of(lifeline)
    _redirect_output(task.output)
    with task.stack.open("w") as stack:
        faulthandler.register(DUMP_SIGNAL, stack, all_threads=True)
        torch.set_num_threads(1)
        try:
            value, before = _call(task)
            _report(pipe, value, None)
            del value  # it may hold what holds a process group
            pipe.recv_bytes()
            _tear_down(before, task.patience)
            _report(pipe, None, None)
        except BaseException as error:
            _report(pipe, None, error)
            os._exit(1)
    os._exit(0)  # interpreter and static destructors are no part of any test


def _call(task: Task) -> tuple[Any, Counter[str]]:
    before = held()
    if task.initialise:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "gloo",
            init_method=f"file://{task.folder / 'store'}",
            rank=task.rank,
            world_size=task.world_size,
            timeout=timedelta(seconds=task.group_timeout),
        )
    function, args = pickle.loads(task.call)
    return function(*args), before


def _tear_down(before: Counter[str], patience: float | None) -> None:
    if dist.is_initialized():
        # While torch holds the group itself. Models lie in cycles, and a collection that came to a
        # group's last holder would wait, with Python's lock, for threads that may want it.
        gc.collect()
        dist.destroy_process_group()
    if patience is not None and (extra := held_beyond(before, patience)):
        raise ResourcesLeaked(f"left behind by the task: {dict(extra)}")


def _report(pipe: Connection, value: Any, error: BaseException | None) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    pipe.send_bytes(_packed(value, error))


def _packed(value: Any, error: BaseException | None) -> bytes:
    details = "".join(traceback.format_exception(error)) if error is not None else ""
    if error is not None:
        error = error.with_traceback(None)
    try:
        return pickle.dumps((value, _portable(error), details))
    except Exception as unpicklable:
        return pickle.dumps((None, RuntimeError(f"unpicklable result: {unpicklable!r}"), details))


def _portable(error: BaseException | None) -> BaseException | None:
    """The error itself where it survives pickling, otherwise its text."""
    with contextlib.suppress(Exception):
        pickle.loads(pickle.dumps(error))
        return error
    return RuntimeError(repr(error))


def _redirect_output(path: Path) -> None:
    with path.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
