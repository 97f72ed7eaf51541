"""Which of a grid's runs are done, in a table that follows them."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table

from comparison.grid import Cell
from comparison.plan import Event, read_events

__all__ = ["Board", "following"]

State = Literal["waiting", "started", "finished", "failed"]
Key = tuple[Cell, int]

_POLL_S = 0.5


class Board:
    """One row a method and learning rate, one column a tau and partition; every field counts seeds.

    Args:
        runs: all runs by name, in the order of running.
        done: names of those that were complete before.
        console: where a line for each run goes, unless a table can be kept in place.
    """

    def __init__(self, runs: dict[str, Key], done: Sequence[str], console: Console) -> None:
        self._runs = runs
        self._states: dict[str, State] = dict.fromkeys(runs, "waiting")
        self._states.update(dict.fromkeys(done, "finished"))
        self._seconds: list[float] = []
        self._console = console
        self._taken = 0

    def begin_launch(self) -> None:
        """Expect the events of another launch."""
        self._taken = 0

    def take(self, events: Sequence[Event]) -> None:
        """Note what has happened since the last time."""
        for event in events[self._taken :]:
            self._taken += 1
            self.note(event)

    def note(self, event: Event) -> None:
        """Note one event; told again, it is no news."""
        if self._states[event.name] == event.state:
            return
        self._states[event.name] = event.state
        if event.state == "finished":
            self._seconds.append(event.seconds)
        if event.state != "started" and not self._console.is_terminal:
            seconds = f" in {event.seconds:.1f} s" if event.state == "finished" else ""
            line = f"[{self._count('finished')}/{len(self._runs)}] {event.name}: {event.state}"
            self._console.print(line + seconds, soft_wrap=True, markup=False)

    def __rich__(self) -> RenderableType:
        cells = [cell for cell, _ in self._runs.values()]
        columns = list(dict.fromkeys((cell.partition, cell.tau) for cell in cells))
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("seeds done", no_wrap=True)
        for partition, tau in columns:
            heading = "every step" if tau is None else f"tau={tau}"
            table.add_column(f"{partition}\n{heading}", justify="right", no_wrap=True)
        for method, lr in dict.fromkeys((cell.method, cell.lr) for cell in cells):
            fields = [self._field(Cell(method, tau, partition, lr)) for partition, tau in columns]
            table.add_row(Cell(method, None, "iid", lr).name("partition"), *fields)
        return Group(table, self._line())

    def _field(self, cell: Cell) -> str:
        states = [self._states[name] for name, (own, _) in self._runs.items() if own == cell]
        if not states:
            return ""
        text = f"{states.count('finished')}/{len(states)}"
        if "failed" in states:
            text += f" [bold red]{states.count('failed')} failed[/bold red]"
        return f"[reverse]{text}[/reverse]" if "started" in states else text

    def _line(self) -> str:
        left = self._count("waiting") + self._count("started")
        words = [f"{self._count('finished')} of {len(self._runs)} runs done"]
        words += [f"running {name}" for name, state in self._states.items() if state == "started"]
        if self._seconds and left:
            each = sum(self._seconds) / len(self._seconds)
            words.append(f"{each:.1f} s a run, about {each * left / 60:.0f} min left")
        return "; ".join(words)

    def _count(self, state: State) -> int:
        return sum(other == state for other in self._states.values())


@contextmanager
def following(board: Board, events: Path, console: Console) -> Iterator[None]:
    """Keep ``board`` up to date with a launch's events inside the block, and on display."""
    over = threading.Event()

    def follow() -> None:
        while not over.wait(_POLL_S):
            board.take(read_events(events))

    board.begin_launch()
    watcher = threading.Thread(target=follow, daemon=True)
    with Live(board, console=console) if console.is_terminal else nullcontext():
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()
            board.take(read_events(events))
