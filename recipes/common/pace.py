"""How fast a run's first steps were, for a program that wants to say how long all will take."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from commhooks import Stats
from common.report import write_json

__all__ = ["Pace", "pace_of", "read_pace", "write_pace"]

_FIRST_STEPS = 5


@dataclass(frozen=True)
class Pace:
    """What the first steps took.

    Attributes:
        steps: how many they were.
        seconds: of training.
        seconds_exposed: of these, waited for communication; 0 under plain DDP, which does not say.
        all_reduce: seconds an all-reduce of the parameters took; 0 under plain DDP.
        steps_per_epoch: of this run.
    """

    steps: int
    seconds: float
    seconds_exposed: float
    all_reduce: float
    steps_per_epoch: int

    @property
    def step(self) -> float:
        """Seconds of a step that waits for nothing."""
        return (self.seconds - self.seconds_exposed) / self.steps


def pace_of(step: int, seconds: float, stats: Stats | None, steps_per_epoch: int) -> Pace | None:
    """The pace after ``step`` steps; None where it is too early to tell.

    An algorithm's first round has to be over, so that the all-reduce is known too.
    """
    if step < _FIRST_STEPS or (stats is not None and not stats.rounds_completed):
        return None
    if stats is None:
        return Pace(step, seconds, 0.0, 0.0, steps_per_epoch)
    exposed = stats.seconds_exposed
    all_reduce = (exposed + stats.seconds_hidden) / stats.rounds_completed
    return Pace(step, seconds, exposed, all_reduce, steps_per_epoch)


def write_pace(pace: Pace, path: Path) -> None:
    """Write ``pace`` to ``path``, which then holds all of it or nothing."""
    write_json(asdict(pace), path)


def read_pace(path: Path) -> Pace | None:
    """What :func:`write_pace` wrote; None where it has not yet."""
    return Pace(**json.loads(path.read_text())) if path.exists() else None
