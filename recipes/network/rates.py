"""What a link can send, and how that changes while the ranks run."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["UNSHAPED", "Change", "Course", "parse_rates"]

UNSHAPED = "unshaped"
"""How no limit is written."""


@dataclass(frozen=True)
class Change:
    """From so many seconds after the start on, another rate."""

    seconds: float
    rate: str


def parse_rates(text: str) -> tuple[str, tuple[Change, ...]]:
    """``200mbit,50mbit@60,1gbit@120`` as the first rate and the changes that follow.

    Raises:
        ValueError: it is written otherwise; says what is wrong.
    """
    first, *later = text.split(",")
    if not first or "@" in first:
        raise ValueError(f"{text!r} does not begin with the rate of the start, such as 200mbit")
    changes = tuple(_parse_change(word) for word in later)
    if changes and UNSHAPED in (first, *(change.rate for change in changes)):
        # Another kind of queue would begin to count its bytes anew.
        raise ValueError(f"{text!r}: a rate that changes cannot be {UNSHAPED} in between")
    moments = [0.0, *(change.seconds for change in changes)]
    if any(late <= early for early, late in pairwise(moments)):
        raise ValueError(f"{text!r}: write the changes in the order in which they happen")
    return first, changes


def _parse_change(word: str) -> Change:
    rate, _, moment = word.partition("@")
    try:
        seconds = float(moment)
    except ValueError:
        seconds = float("nan")
    # NaN and infinity are numbers too, as far as Python is concerned.
    if not rate or not 0 < seconds < float("inf"):
        raise ValueError(f"{word!r}: write a change as RATE@SECONDS, such as 50mbit@60")
    return Change(seconds, rate)


class Course:
    """Makes the changes when their time has come.

    Args:
        changes: in the order in which they happen.
        make: called with each, once.
    """

    def __init__(self, changes: Sequence[Change], make: Callable[[Change], None]) -> None:
        self._left = list(changes)
        self._make = make
        self._start = time.monotonic()

    def keep_up(self) -> None:
        """Make what is due; to be called again and again."""
        while self._left and time.monotonic() >= self._start + self._left[0].seconds:
            self._make(self._left.pop(0))
