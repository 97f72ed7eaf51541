"""Which parameters registered states average: each belongs to one state at a time."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from commhooks.engine.steps.sharded import local_shard
from commhooks.errors import RegistrationError

__all__ = ["claim", "refuse_claimed", "release"]


class Claimant(Protocol):
    """A state."""

    @property
    def model(self) -> nn.Module | None:
        """What it is registered on; None if that is gone."""


_claims: weakref.WeakKeyDictionary[Claimant, Mapping[str, Tensor]] = weakref.WeakKeyDictionary()


def claim(state: Claimant, parameters: Mapping[str, Tensor]) -> None:
    """Note that ``state`` averages these parameters, until it is released or its model is gone."""
    _claims[state] = parameters


def release(state: Claimant) -> None:
    """The state has been closed."""
    _claims.pop(state, None)


def refuse_claimed(parameters: Mapping[str, Tensor]) -> None:
    """Refuse parameters that another registered state averages already.

    Args:
        parameters: those that are to be registered, by name.

    Raises:
        RegistrationError: one of them, or its memory, belongs to another state.
    """
    if _shared(parameters) is None:
        return
    # A model that nobody can reach any more may still be there, on one rank and not on another.
    gc.collect()
    shared = _shared(parameters)
    if shared is not None:
        name, state, other = shared
        raise RegistrationError(
            f"Parameter {name!r} is averaged by another state already: {state!r} is registered on "
            f"a model that has it as {other!r}. Two states would average it in turn, each of them "
            "half-way through the other's cycle. Put both models into one module, wrap that one in "
            "DistributedDataParallel and register one state on it; or, if the other training is "
            "over, call finish() and close() on its state first."
        )


def _shared(parameters: Mapping[str, Tensor]) -> tuple[str, Claimant, str] | None:
    """The first of ``parameters`` that is claimed, by whom, and its name there."""
    mine = {place: name for name, p in parameters.items() if (place := _place(p))}
    for state, claimed in list(_claims.items()):
        # Without its model a state makes no steps any more.
        if state.model is None:
            continue
        for other, p in claimed.items():
            if (name := mine.get(_place(p))) is not None:
                return name, state, other
    return None


def _place(parameter: Tensor) -> int:
    """Where the numbers are, since two parameters may share their memory; 0 if there are none."""
    return (local_shard(parameter) if hasattr(parameter, "to_local") else parameter).data_ptr()
