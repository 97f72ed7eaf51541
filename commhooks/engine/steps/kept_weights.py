"""Optimizers that keep weights of their own, from which every step would undo the averages."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from commhooks.engine.vectors.bits import fingerprint
from commhooks.engine.vectors.chunks import real
from commhooks.errors import RegistrationError

__all__ = ["CopySearch", "check_optimizer"]

_ADVICE = "Use a plain optimizer inside, such as torch.optim.AdamW, on the model's own parameters."

# Some optimizers make their copies of the weights at the first step, Lookahead at the fifth.
_CHECKED_STEPS = 10

# How deep lists and dictionaries are looked through for copies of the weights.
_DEPTH = 5


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse what is known to work on other tensors than the model's parameters.

    Raises:
        RegistrationError: the optimizer shards its work over the ranks, or swaps weights.
    """
    name = type(optimizer).__name__
    if "lookahead" in name.lower():
        raise RegistrationError(
            f"{name} keeps slow weights and writes the parameters from them every few steps, so "
            f"that an average would be undone. {_ADVICE} BMUF does to the mean of the "
            "models what Lookahead does to one."
        )
    if name in ("DAdaptSGD", "DAdaptAdaGrad"):
        raise RegistrationError(
            f"{name} writes the parameters from where they started and the sum of its own "
            "gradients since then, so that an average would be undone. Take an optimizer that "
            "moves them from where they are, such as DAdaptAdam or Prodigy."
        )
    if any(base.__name__ == "ZeroRedundancyOptimizer" for base in type(optimizer).__mro__):
        raise RegistrationError(
            f"{name} lets every rank update a part of the model from gradients that are averaged "
            "at every step. With local gradients each part would be trained on one rank's data "
            "alone. Give every rank the whole optimizer."
        )
    if all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval")):
        raise RegistrationError(
            f"{name} has modes train() and eval(), between which it swaps the weights for others "
            f"that it keeps (as Schedule-Free does); an average would be undone. {_ADVICE}"
        )


class CopySearch:
    """Looks for copies of the weights behind an optimizer's first steps, and refuses them.

    fp32 masters of half-precision parameters, Lookahead's slow weights: the next step writes from
    them, whatever the parameters have become meanwhile. Only weights that a step has moved to where
    they have not been before can tell. The others may equal what an optimizer remembers of its
    start (Prodigy, D-Adaptation, DoG): at a learning rate of 0, or in bf16, where small steps are
    rounded away or back.

    torch's own optimizers are known to keep no weights that they write from (ASGD keeps an average
    that it never uses).
    """

    def __init__(self) -> None:
        self._moves: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        # Where each parameter has been.
        self._seen: weakref.WeakKeyDictionary[Optimizer, dict[Tensor, set[int]]]
        self._seen = weakref.WeakKeyDictionary()

    def goes_on(self, optimizer: Optimizer) -> bool:
        """Whether :meth:`before_step` has to be called."""
        foreign = type(optimizer).__module__.partition(".")[0] != "torch"
        return foreign and self._moves.get(optimizer, 0) < _CHECKED_STEPS

    def before_step(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        """Note where the weights are."""
        seen = self._seen.setdefault(optimizer, {})
        for parameter in parameters:
            seen.setdefault(parameter, set()).add(int(fingerprint(real(parameter))))

    def after_step(self, optimizer: Optimizer) -> None:
        """Look at the weights that the step has moved.

        Raises:
            RegistrationError: for each of them it holds another tensor of the same values.
        """
        moved = []
        for parameter, seen in self._seen.get(optimizer, {}).items():
            now = int(fingerprint(real(parameter)))
            if now not in seen:
                seen.add(now)
                moved.append(parameter)
        if moved:
            moves = self._moves[optimizer] = self._moves.get(optimizer, 0) + 1
            if moves == _CHECKED_STEPS:
                del self._seen[optimizer]
            _check_weights(optimizer, moved)


def _check_weights(optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
    held = {id(tensor): tensor for tensor in _tensors(vars(optimizer), _DEPTH)}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            held.pop(id(parameter), None)
    # By dtype, since masters may be kept for half-precision parameters alone.
    for dtype in {parameter.dtype for parameter in parameters}:
        telling = [p.detach() for p in parameters if p.dtype == dtype and _tells(p)]
        if telling and all(any(_is_copy(each, p) for each in held.values()) for p in telling):
            raise RegistrationError(
                f"{type(optimizer).__name__} keeps copies of the weights (such as fp32 masters or "
                "slow weights) and writes the parameters from them, so that its next step would "
                f"undo every average. {_ADVICE}"
            )


def _tells(parameter: Tensor) -> bool:
    """Whether equal values can be no coincidence."""
    return parameter.numel() > 1 and bool((parameter.detach() != 0).sum() > 1)


def _is_copy(other: Tensor, parameter: Tensor) -> bool:
    return (
        other.numel() == parameter.numel()
        and other.device == parameter.device
        and other.data_ptr() != parameter.data_ptr()
        and torch.equal(other.detach().reshape(-1).to(parameter.dtype), parameter.reshape(-1))
    )


def _tensors(value: object, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth:
        members: Iterable[object] = ()
        if isinstance(value, dict):
            members = list(value.values())
        elif isinstance(value, list | tuple | set):
            members = list(value)
        elif isinstance(value, Optimizer):
            members = list(vars(value).values())
        for member in members:
            yield from _tensors(member, depth - 1)
