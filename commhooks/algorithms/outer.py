"""An optimizer of the global model: what it steps, and what a checkpoint must hold of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from commhooks.engine.rules import Part
from commhooks.errors import CheckpointError

__all__ = ["OuterOptimizer", "check_outer_state", "stepped"]

Build = Callable[[list[Tensor]], Optimizer]


class OuterOptimizer:
    """An optimizer over views of z, whose gradients are views of the wire.

    Args:
        build: builds it from a list of parameters.
        parts: the parameters of a fragment.
    """

    def __init__(self, build: Callable[[list[Tensor]], Optimizer], parts: Sequence[Part]) -> None:
        parameters: list[Tensor] = []
        for part in parts:
            parameter = torch.nn.Parameter(part.vectors["z"])
            parameter.grad = part.vectors["wire"]
            parameters.append(parameter)
        self._optimizer = build(parameters)

    def step(self) -> None:
        """One step; the gradients are what the wire holds now."""
        self._optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """What the optimizer says of itself."""
        return self._optimizer.state_dict()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self._optimizer.load_state_dict(dict(saved))


def stepped(build: Build, like: Tensor) -> Optimizer:
    """The optimizer of one parameter of zeros, after a step with a gradient of zeros."""
    device = "cpu" if like.is_meta else like.device
    parameter = torch.nn.Parameter(torch.zeros(like.shape, dtype=like.dtype, device=device))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = build([parameter])
    optimizer.step()
    return optimizer


def check_outer_state(
    build: Build, parts: Sequence[Tensor], saved: object, *, launched: bool
) -> None:
    """Compare a saved state with that of an optimizer of as many zeros, one parameter at a time.

    An optimizer's own ``load_state_dict`` takes almost anything.

    Args:
        build: builds the optimizer.
        parts: like what it steps, of a fragment.
        saved: what :meth:`OuterOptimizer.state_dict` gave.
        launched: whether it has made a step.

    Raises:
        CheckpointError: names, shapes, formats or hyper-parameters differ, or a number is not
            finite.
    """
    built = build([torch.nn.Parameter(each) for each in parts])
    groups = built.state_dict()["param_groups"]
    states: dict[int, Any] = {}
    for number, each in enumerate(parts if launched else ()):
        for state in stepped(build, each).state_dict()["state"].values():
            states[number] = state
    # torch's own optimizers keep hyper-parameters there, and others what they adapt, too.
    fixed = type(built).__module__.startswith("torch.optim.")
    entries: Mapping[str, Any] = saved if isinstance(saved, Mapping) else {}
    where = "the outer optimizer's"
    problem = _difference(entries.get("state"), states, f"{where} state") or _difference(
        entries.get("param_groups"), groups, f"{where} param_groups", equal=fixed
    )
    if problem:
        raise CheckpointError(f"The checkpoint is damaged: {problem}. Nothing has been loaded.")


def _difference(saved: Any, wanted: Any, where: str, *, equal: bool = False) -> str | None:
    """What of ``saved`` is not as in ``wanted``; the numbers may differ unless ``equal``."""
    if isinstance(wanted, Mapping):
        if not isinstance(saved, Mapping) or set(saved) != set(wanted):
            return f"{where} should have the entries {list(wanted)}"
        pairs = [(key, saved[key], value) for key, value in wanted.items()]
    elif isinstance(wanted, list | tuple):
        if not isinstance(saved, list | tuple) or len(saved) != len(wanted):
            return f"{where} should have {len(wanted)} entries"
        pairs = [(n, *pair) for n, pair in enumerate(zip(saved, wanted, strict=True))]
    else:
        return None if _fits(saved, wanted, equal=equal) else f"{where} should be like {wanted!r}"
    for key, mine, value in pairs:
        if problem := _difference(mine, value, f"{where}[{key!r}]", equal=equal):
            return problem
    return None


def _fits(saved: Any, wanted: Any, *, equal: bool) -> bool:
    if isinstance(wanted, Tensor):
        if not isinstance(saved, Tensor):
            return False
        alike = (saved.dtype, saved.shape) == (wanted.dtype, wanted.shape)
        finite = alike and bool(torch.isfinite(saved).all())
        return finite and not (equal and not torch.equal(saved.cpu(), wanted.cpu()))
    if isinstance(saved, float) and not math.isfinite(saved):
        return False
    return bool(saved == wanted) if equal else type(saved) is type(wanted)
