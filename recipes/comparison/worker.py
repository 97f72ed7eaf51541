"""Run a recipe several times in one launch, every run in processes of its own.

    accelerate launch ... comparison/worker.py PLAN

To start Python and import PyTorch takes longer than a small run. So each worker imports the recipe
once and then forks for every run: the child is what a launch of this run alone would have started.
It has seen nothing of the runs before it, and whatever it leaves behind goes with it.
"""

import importlib
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import wandb

from common.session import RUN_OF_LAUNCH, is_main_worker
from comparison.plan import Event, Plan, Task, read_plan, write_event


def main() -> int:
    """Run what the plan says, up to the first run that fails; its status."""
    plan = read_plan(Path(sys.argv[1]))
    # As in a script that is launched itself; before the folder of this one.
    sys.path.insert(0, str(plan.recipe.parent))
    # For the children: what they import is there already.
    importlib.import_module(plan.recipe.stem)
    for number, task in enumerate(plan.tasks):
        started = time.monotonic()
        _tell(plan, Event(task.name, "started"))
        child = os.fork()
        if child == 0:
            _become(plan, task, number)
        with _ended_with_us(child):
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            _tell(plan, Event(task.name, "failed"))
            # A process killed by signal n counts as status 128 + n, as in a shell.
            return status if status > 0 else 128 - status
        _tell(plan, Event(task.name, "finished", time.monotonic() - started))
    return 0


def _become(plan: Plan, task: Task, number: int) -> NoReturn:
    """Run the recipe in this process, as if it had been launched; what it prints goes to a file."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    task.log.parent.mkdir(parents=True, exist_ok=True)
    # Appended to, since all workers write there.
    log = os.open(task.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ[RUN_OF_LAUNCH] = str(number)
    sys.argv = [str(plan.recipe), *task.arguments]
    status = 1
    try:
        runpy.run_path(str(plan.recipe), run_name="__main__")
        status = 0
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:  # noqa: BLE001 - shown, and told by the status
        traceback.print_exc()
    finally:
        # All that an interpreter would do at its end and that is needed: the rest is to take apart
        # every module, which costs a forked process as much time as a small run.
        wandb.teardown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@contextmanager
def _ended_with_us(child: int) -> Iterator[None]:
    """Hand on the launcher's SIGTERM inside the block."""

    def leave(number: int, frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(child, number)
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    yield
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _tell(plan: Plan, event: Event) -> None:
    if is_main_worker():
        write_event(plan, event)


if __name__ == "__main__":
    sys.exit(main())
