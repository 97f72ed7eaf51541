"""Several runs in one launch: what fails takes nothing else along, and nothing is left running."""

import re
import time
from io import StringIO
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
from rich.console import Console

from common.tracking import RunIdentity
from comparison import running
from comparison.grid import Cell, Method
from comparison.plan import Event, Plan, read_events, write_event, write_plan
from comparison.progress import Board
from comparison.recipe import PlannedRun
from tests.harness import scaled

# A recipe that trains nothing. Its rank 1 may fail while rank 0 would go on for long.
RECIPE = """
import os, pathlib, sys, time
count = 0

def main():
    global count
    count += 1
    behaviour, folder = sys.argv[1:]
    rank = os.environ["RANK"]
    (pathlib.Path(folder) / f"{behaviour}-{rank}-{os.getpid()}").touch()
    print(behaviour, "count", count, "rank", rank, os.path.basename(sys.argv[0]), flush=True)
    if behaviour == "fails" and rank == "1":
        time.sleep(1)
        raise RuntimeError("no luck")
    if behaviour == "fails":
        time.sleep(600)

if __name__ == "__main__":
    main()
"""
BEHAVIOURS = ("works", "fails", "works-again")
CELL = Cell(Method("local-sgd"), 8, "iid")


def planned(behaviours: tuple[str, ...], folder: Path) -> list[PlannedRun]:
    return [
        PlannedRun(CELL, seed, (behaviour, str(folder)), RunIdentity("", "", "", ()), {})
        for seed, behaviour in enumerate(behaviours)
    ]


@pytest.mark.slow
def test_a_run_that_fails_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe_of_a_test.py"
    recipe.write_text(RECIPE)
    pids = tmp_path / "pids"
    pids.mkdir()
    shown = StringIO()
    failed = running.run_all(
        planned(BEHAVIOURS, pids),
        [],
        recipe=recipe,
        workers=2,
        link=None,
        folder=tmp_path / "out",
        console=Console(width=100, file=shown),
    )
    printed = shown.getvalue()
    assert failed == ["local-sgd tau=8 iid seed=1"]
    assert "RuntimeError: no luck" in printed
    assert "[1/3] local-sgd tau=8 iid seed=0: finished in" in printed
    assert "[2/3] local-sgd tau=8 iid seed=2: finished in" in printed
    # Once for every run and rank, each in a process of its own.
    marks = [path.name.rsplit("-", 2) for path in pids.iterdir()]
    assert sorted((b, rank) for b, rank, _ in marks) == sorted(
        (b, rank) for b in BEHAVIOURS for rank in ("0", "1")
    )
    assert len({pid for *_, pid in marks}) == 6
    deadline = time.monotonic() + scaled(10)
    while any(psutil.pid_exists(int(pid)) for *_, pid in marks) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(psutil.pid_exists(int(pid)) for *_, pid in marks)
    # What the recipe prints goes to the run's own file; it sees nothing of the runs before.
    log = (tmp_path / "out" / "logs" / "local-sgd-tau=8-iid-seed=2.txt").read_text()
    assert sorted(log.splitlines()) == [
        f"works-again count 1 rank {rank} recipe_of_a_test.py" for rank in (0, 1)
    ]


def test_events_come_back_as_they_were(tmp_path: Path) -> None:
    plan = Plan(Path("recipe.py"), tmp_path / "events.jsonl", ())
    write_plan(plan, tmp_path / "plan.json")
    events = [Event("a", "started"), Event("a", "finished", 1.5)]
    for event in events:
        write_event(plan, event)
    with plan.events.open("a") as half:
        half.write('{"name": "b", "sta')
    assert read_events(plan.events) == events


def test_the_board_counts_seeds() -> None:
    console = Console(width=100, color_system=None, force_terminal=True)
    cells = [Cell(Method("ddp"), None, "iid"), CELL]
    runs = {f"{cell.label} seed={seed}": (cell, seed) for seed in (0, 1) for cell in cells}
    board = Board(runs, ["ddp iid seed=0"], console)
    events = [
        Event("local-sgd tau=8 iid seed=0", "started"),
        Event("local-sgd tau=8 iid seed=0", "finished", 30.0),
        Event("ddp iid seed=1", "failed"),
        Event("local-sgd tau=8 iid seed=1", "started"),
    ]
    # Told twice, an event counts once.
    board.take(events[:2])
    board.take(events)
    with console.capture() as captured:
        console.print(board)
    # Without what marks a field that is running.
    shown = re.sub(r"\x1b\[[0-9;]*m", "", captured.get())
    rows = [line.split() for line in shown.splitlines() if line.strip()]
    assert ["ddp", "1/2", "1", "failed"] in rows
    assert ["local-sgd", "1/2"] in rows
    assert "2 of 4 runs done; running local-sgd tau=8 iid seed=1" in shown
    assert "30.0 s a run" in shown
