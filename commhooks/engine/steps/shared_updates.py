"""Optimizers that tell one another their updates, so that each trains on one rank's data."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from commhooks.engine.network.communicator import Communicator
from commhooks.engine.network.islands import Layout
from commhooks.engine.network.others import Others
from commhooks.engine.vectors.bits import fingerprint
from commhooks.engine.vectors.chunks import real
from commhooks.errors import RegistrationError

__all__ = ["SharedUpdates"]

# Fewer numbers can come out alike by chance, since a first step of Adam or Lion is a sign.
_NUMEL = 16
# A learning rate that is warmed up from 0 moves nothing at first.
_STEPS = 10
# The optimizer's own collective has just made the ranks wait for one another.
_SECONDS = 10.0


class _Steps(Protocol):
    @property
    def averages_gradients(self) -> bool: ...
    @property
    def updated_locally(self) -> bool: ...


class _Seen(NamedTuple):
    """Of one parameter around a step: its size, and fingerprints of it and of its gradient."""

    numel: int
    before: int
    after: int
    gradient_before: int
    gradient_after: int


class SharedUpdates:
    """Looks whether a local step has left parameters alike whose gradients were not.

    An optimizer that updates every m-th matrix on its rank and gathers the rest is right under DDP,
    where all ranks have the same gradient. With local ones each matrix would be trained on the data
    of one rank alone, and the gap between the workers, which could tell of it, is 0.

    Only an optimizer whose first local step has communicated is looked at. What the ranks then tell
    one another goes through the store, since another thread may have made those collectives, on
    this rank alone.

    Args:
        steps: knows which steps are local.
        others: counts collectives.
        everyone: all ranks that train together.
        layout: which of them make one worker.
    """

    def __init__(
        self, steps: _Steps, others: Others, everyone: Communicator, layout: Layout
    ) -> None:
        self._steps = weakref.ref(steps)
        self._others = others
        self._everyone = everyone
        self._layout = layout
        self._judged: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._begun: weakref.WeakKeyDictionary[Optimizer, tuple[int, list[tuple[int, int]]]] = (
            weakref.WeakKeyDictionary()
        )
        self._compared = 0

    def before(self, optimizer: Optimizer, parameters: Callable[[], Sequence[Tensor]]) -> None:
        """An optimizer is about to step.

        Args:
            optimizer: it.
            parameters: finds those of the model that it updates.
        """
        steps = self._steps()
        if self._layout.m == 1 or optimizer in self._judged:
            return
        if steps is None or steps.averages_gradients:
            return
        # The step that a subclass inherits may be a part of its own, and is announced, too.
        if optimizer not in self._begun:
            self._begun[optimizer] = self._others.started(), _fingerprints(parameters())

    def after(self, optimizer: Optimizer, parameters: Callable[[], Sequence[Tensor]]) -> None:
        """It has.

        Raises:
            RegistrationError: on every rank, if it shares updates of parameters with other workers.
        """
        begun = self._begun.pop(optimizer, None)
        steps = self._steps()
        if begun is None or steps is None or not steps.updated_locally:
            return
        started, before = begun
        if self._others.started() == started:
            self._judged.add(optimizer)
            return
        name = type(optimizer).__name__
        self._others.optimizer = name
        tensors = parameters()
        if len(tensors) != len(before):
            return
        mine = [
            # Biases before a normalisation have gradients of rounding errors alone, and are moved
            # by weight decay.
            _Seen(p.numel() if p.dim() > 1 else 0, old, new, old_gradient, new_gradient)
            for p, (old, old_gradient), (new, new_gradient) in zip(
                tensors, before, _fingerprints(tensors), strict=True
            )
        ]
        shared = self._shared(mine)
        if shared is None:
            return
        self._judged.add(optimizer)
        if shared:
            raise RegistrationError(
                f"{name} shares its updates between the ranks: a step on local gradients has left "
                "parameters the same on several workers, whose gradients for them were not. Each "
                "of these parameters would be trained on the data of one rank alone. Take an "
                "optimizer that updates every parameter on every rank, such as torch.optim.Muon; "
                "or make the ranks that share updates one worker with island=, and let the "
                "optimizer communicate inside that island alone."
            )

    def _shared(self, mine: list[_Seen]) -> bool | None:
        """Whether workers have parameters alike after the step; None if it cannot be said yet."""
        self._compared += 1
        told = self._everyone.told(f"update-{self._compared}", json.dumps(mine), _SECONDS)
        if told is None:
            # Not every rank has seen collectives: they are not the optimizer's.
            return False
        seen = {
            rank: [_Seen(*each) for each in json.loads(text)]
            for rank, text in zip(self._everyone.ranks, told, strict=True)
        }
        moved = any(p.before != p.after for of in seen.values() for p in of)
        if not moved and self._compared < _STEPS:
            return None
        found = 0
        for peers in zip(*self._layout.islands, strict=True):
            for parameter in zip(*(seen[rank] for rank in peers), strict=False):
                found = max(found, _alike(parameter))
        return found >= _NUMEL


def _alike(parameter: Sequence[_Seen]) -> int:
    """The size of a parameter that two workers have alike after they moved it differently."""
    for number, one in enumerate(parameter):
        for other in parameter[number + 1 :]:
            moved = one.before != one.after or other.before != other.after
            # The gradient of a closure comes after, and that of some optimizers is then reduced.
            own = (one.gradient_before, one.gradient_after)
            theirs = (other.gradient_before, other.gradient_after)
            if moved and one.after == other.after and own != theirs:
                return one.numel
    return 0


def _fingerprints(parameters: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Of every parameter and its gradient; 0 for one that is not there."""
    if not parameters:
        return []
    device = parameters[0].device
    zero = torch.zeros((), dtype=torch.int64, device=device)
    numbers = [
        zero if each is None or each.is_sparse else fingerprint(real(_local(each))).to(device)
        for p in parameters
        for each in (p, p.grad)
    ]
    values = torch.stack(numbers).tolist()
    return list(zip(values[::2], values[1::2], strict=True))


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor of FSDP2's."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local
