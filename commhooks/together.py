"""What ranks do together: it succeeds on every rank, or it raises on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from commhooks.engine.network.agreement import by_rank, tell
from commhooks.errors import CheckpointError, RegistrationError, RoundError

__all__ = ["by_rank", "described", "gathered", "together"]

T = TypeVar("T")


def gathered(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's value, by rank. Collective: it returns on no rank before all have come.

    Args:
        value: this rank's; it is pickled.
        group: the ranks; None means all, or this process alone where ``torch.distributed`` is not
            initialised.

    Raises:
        CheckpointError: a rank has left, or the ranks wait for one another.
    """
    world = group or dist.group.WORLD if dist.is_initialized() else None
    try:
        return [value] if world is None else tell(world, value)
    except RegistrationError as error:
        raise CheckpointError(str(error)) from error


def together(
    complaint: str, action: Callable[[], object], group: dist.ProcessGroup | None = None
) -> None:
    """Run ``action`` on every rank; raise on all of them if it fails on one. Collective.

    Args:
        complaint: what did not happen, for the ranks on which nothing went wrong.
        action: takes part in no collective once it may have failed on one rank alone.
        group: the ranks, as in :func:`gathered`.

    Raises:
        CheckpointError: another rank failed. The rank that failed raises its own error.
        RoundError: ``action`` raised it. It fails on every rank by itself, and the ranks may no
            longer reach each other.
    """
    failure: Exception | None = None
    try:
        action()
    except RoundError:
        raise
    except Exception as error:  # noqa: BLE001 - raised again once everybody knows
        failure = error
    reasons = gathered(described(failure) if failure else None, group)
    if failure is not None:
        raise failure
    if any(reasons):
        raise CheckpointError(f"{complaint}: {by_rank(reasons)}")


def described(error: Exception) -> str:
    """An error in one line, for the other ranks' messages."""
    if isinstance(error, CheckpointError):
        return str(error)
    return f"{type(error).__name__}: {error}"
