"""Running what is left of a grid, in as few launches as possible."""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from common.launch import RECIPES, LaunchError, launch
from comparison.plan import Event, Plan, Task, read_events, write_plan
from comparison.progress import Board, following
from comparison.recipe import PlannedRun

__all__ = ["run_all"]

_WORKER = RECIPES / "comparison" / "worker.py"
_LOG_LINES = 15


def run_all(
    planned: Sequence[PlannedRun],
    done: Sequence[PlannedRun],
    *,
    recipe: Path,
    workers: int,
    link: str | None,
    folder: Path,
    console: Console,
) -> list[str]:
    """Run those of ``planned`` that are not ``done``; the names of the ones that failed.

    A run that fails takes its launch along, so that another has to go on after it.

    Raises:
        LaunchError: a launch failed before any of its runs had started.
    """
    board = Board(
        {_name(run): (run.cell, run.seed) for run in planned}, [*map(_name, done)], console
    )
    left = [run for run in planned if run not in done]
    failed: list[str] = []
    while left:
        plan = _plan(left, recipe, folder)
        write_plan(plan, folder / "plan.json")
        try:
            with following(board, plan.events, console):
                _launch(folder / "plan.json", workers, link)
        except LaunchError as error:
            states = {event.name: event.state for event in read_events(plan.events)}
            culprits = [name for name, state in states.items() if state != "finished"]
            if not culprits:
                raise
            for name in culprits:
                board.note(Event(name, "failed"))
                _show_end(plan, name, str(error), console)
            failed += culprits
            left = [run for run in left if _name(run) not in states]
        else:
            left = []
    return failed


def _plan(runs: Sequence[PlannedRun], recipe: Path, folder: Path) -> Plan:
    tasks = []
    for run in runs:
        log = folder / "logs" / f"{re.sub(r'[^a-z0-9.=]+', '-', _name(run))}.txt"
        log.unlink(missing_ok=True)
        tasks.append(Task(_name(run), run.arguments, log.resolve()))
    folder.mkdir(parents=True, exist_ok=True)
    return Plan(recipe.resolve(), (folder / "events.jsonl").resolve(), tuple(tasks))


def _launch(plan: Path, workers: int, link: str | None) -> None:
    within: list[str] = []
    if link is not None:
        shaped = ["--ranks", str(workers), "--rate", link, "--strict"]
        within = [sys.executable, str(RECIPES / "link.py"), *shaped, "--"]
    search = os.pathsep.join(filter(None, [str(RECIPES), os.environ.get("PYTHONPATH")]))
    launch(
        _WORKER,
        [str(plan.resolve())],
        workers=workers,
        capture=True,
        environment={"PYTHONPATH": search},
        within=within,
    )


def _show_end(plan: Plan, name: str, error: str, console: Console) -> None:
    """What the run printed last, or, where it printed nothing, what the launch did."""
    (log,) = [task.log for task in plan.tasks if task.name == name]
    printed = log.read_text(errors="replace") if log.exists() else ""
    console.print(f"{name} failed; see {log}", style="bold red", soft_wrap=True, markup=False)
    for line in (printed or error).rstrip().splitlines()[-_LOG_LINES:]:
        console.print(f"  {line}", soft_wrap=True, markup=False, highlight=False)


def _name(run: PlannedRun) -> str:
    return f"{run.cell.label} seed={run.seed}"
