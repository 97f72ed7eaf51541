"""Runs a script on several ranks, as a launcher would, in forks that have imported torch already.

A launcher imports torch once for itself and once for every rank, which takes far longer than what
the small runs of a test do then.
"""

import atexit
import multiprocessing
import os
import pickle
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from tests.harness.launch import GRACE, run_tasks
from tests.harness.limits import scaled
from tests.harness.worker import Task


class ScriptFailed(Exception):
    """The script ended with another status than 0; ``printed`` is what all ranks printed."""

    def __init__(self, message: str, printed: str) -> None:
        super().__init__(message, printed)
        self.printed = printed

    def __str__(self) -> str:
        return f"{self.args[0]}\n{self.printed}".rstrip()


class Status(Exception):
    """A rank's own end, where that was no success."""


def run_script(
    script: Path, arguments: Sequence[str], world_size: int, *, folder: Path, timeout: float
) -> str:
    """What ``script`` printed, rank after rank; runs in ``folder``, with torchrun's environment.

    Raises `ScriptFailed` when a rank ended with another status than 0 or ``timeout`` seconds
    (longer on a busy machine) were not enough. No process is left, however it ends.
    """
    # Held by this process as torchrun's agent holds it, so that the system can choose the port.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]

    def task(shared: Path, rank: int) -> Task:
        variables = _environment(rank, world_size, store.port)
        call = pickle.dumps((_as_main, (str(script), list(arguments), str(folder), variables)))
        return Task(rank, world_size, call, shared, scaled(timeout), False, None)

    ends = run_tasks(task, world_size, scaled(timeout), scaled(GRACE), daemon=False)
    printed = "".join(end.output for end in ends)
    if failures := [end for end in ends if end.error is not None]:
        causes = [f"rank {end.rank}: {end.error}" for end in failures]
        raise ScriptFailed("\n".join([f"{script.name} failed", *causes]), printed)
    return printed


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The variables that torchrun sets on one machine."""
    numbers = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "ROLE_RANK": rank,
        "GROUP_RANK": 0,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "ROLE_WORLD_SIZE": world_size,
        "GROUP_WORLD_SIZE": 1,
        "MASTER_PORT": port,
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_MAX_RESTARTS": 0,
        "OMP_NUM_THREADS": 1,
    }
    return {
        **{name: str(number) for name, number in numbers.items()},
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _as_main(script: str, arguments: list[str], folder: str, variables: dict[str, str]) -> None:
    """This process as ``python script arguments``, to the last of its exit functions."""
    os.environ |= variables
    os.chdir(folder)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    multiprocessing.set_start_method(None, force=True)  # not the one that made this process
    status: object = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        status = 0 if end.code is None else end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    if status != 0:
        raise Status(f"status {status}")
