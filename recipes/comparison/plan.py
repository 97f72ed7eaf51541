"""What one launch is to run, and what it tells about it meanwhile: two small files."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = ["Event", "Plan", "Task", "read_events", "read_plan", "write_event", "write_plan"]


@dataclass(frozen=True)
class Task:
    """One run: its name, the recipe's command line, and the file for what it prints."""

    name: str
    arguments: tuple[str, ...]
    log: Path


@dataclass(frozen=True)
class Plan:
    """Runs of one recipe, in order, and the file that events are appended to."""

    recipe: Path
    events: Path
    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class Event:
    """What happened to a run; ``seconds`` is how long it took, from start to end of its process."""

    name: str
    state: Literal["started", "finished", "failed"]
    seconds: float = 0.0


def write_plan(plan: Plan, path: Path) -> None:
    """Write ``plan`` to ``path``, and begin its file of events."""
    plan.events.write_text("")
    path.write_text(json.dumps(asdict(plan), default=str, indent=1) + "\n")


def read_plan(path: Path) -> Plan:
    """What :func:`write_plan` wrote."""
    found: dict[str, Any] = json.loads(path.read_text())
    tasks = [Task(t["name"], tuple(t["arguments"]), Path(t["log"])) for t in found["tasks"]]
    return Plan(Path(found["recipe"]), Path(found["events"]), tuple(tasks))


def write_event(plan: Plan, event: Event) -> None:
    """Append ``event`` to the plan's events."""
    with plan.events.open("a") as events:
        events.write(json.dumps(asdict(event)) + "\n")


def read_events(path: Path) -> Sequence[Event]:
    """The events so far; a line that is still being written is left for the next time."""
    whole, _, _ = path.read_text().rpartition("\n")
    return [Event(**json.loads(line)) for line in whole.splitlines()]
