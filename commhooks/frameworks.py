"""What the integrations of training frameworks share."""

from __future__ import annotations

import copy
from dataclasses import asdict

from commhooks.engine.state import CommHookState
from commhooks.stats import Stats

__all__ = ["comm_metrics", "successor"]


def comm_metrics(stats: Stats) -> dict[str, float]:
    """A state's counters by the names they have in a logger, such as ``comm/rounds_completed``."""
    return {f"comm/{name}": value for name, value in asdict(stats).items() if value is not None}


def successor(state: CommHookState) -> CommHookState:
    """A state that can be registered, with the hyper-parameters of one whose time is over."""
    following = copy.copy(state)
    # A copy leaves it out, since a process group cannot be copied.
    following.process_group = state.process_group
    return following
