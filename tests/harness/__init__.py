"""Runs a function on several real processes over gloo, and never leaves one behind.

>>> from tests.harness import run_ranks
>>> run_ranks(rank_of, 2)  # doctest: +SKIP
[0, 1]
"""

from tests.harness.launch import preload, rank_outcomes, run_ranks
from tests.harness.limits import scaled
from tests.harness.outcome import (
    Outcome,
    RankDied,
    RanksFailed,
    RankStuck,
    ResourcesLeaked,
)

__all__ = [
    "Outcome",
    "RankDied",
    "RankStuck",
    "RanksFailed",
    "ResourcesLeaked",
    "preload",
    "rank_outcomes",
    "run_ranks",
    "scaled",
]
