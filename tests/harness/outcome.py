"""What became of one rank, and the error that tells it for all of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


class RankDied(Exception):
    """The process ended without reporting; the message holds its exit code."""


class RankStuck(Exception):
    """The process was still running at the deadline; the message holds the stack it was in."""


class ResourcesLeaked(Exception):
    """Threads or sockets outlived the task and the destruction of its process group."""


class RanksFailed(AssertionError):
    """Some rank failed; the message holds every rank's traceback, stack and output."""


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """One rank's end: ``value`` where it returned, ``error`` and ``details`` where it did not."""

    rank: int
    value: T | None = None
    error: BaseException | None = None
    details: str = ""
    output: str = ""

    def describe(self) -> str:
        if self.error is None:
            return f"--- rank {self.rank}: returned"
        head = f"--- rank {self.rank}: {type(self.error).__name__}"
        output = f"\nits output:\n{self.output.rstrip()}" if self.output.strip() else ""
        return f"{head}\n{self.details.rstrip()}{output}"


def values_or_raise(outcomes: Sequence[Outcome[T]]) -> list[T]:
    """Every rank's value; `RanksFailed` when a rank has none."""
    if any(outcome.error is not None for outcome in outcomes):
        raise RanksFailed("\n".join(["a rank failed", *(o.describe() for o in outcomes)]))
    return [outcome.value for outcome in outcomes]  # type: ignore[misc]
