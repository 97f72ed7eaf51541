"""Types of hyper-parameters that say their range, and the check of a dataclass's fields by them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from functools import cache, partial
from numbers import Integral, Real
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from commhooks.errors import HyperParameterError

__all__ = [
    "Count",
    "Flag",
    "Fragments",
    "HalfOpenUnit",
    "IslandRanks",
    "Names",
    "Outer",
    "Positive",
    "Steps",
    "Tau",
    "Unit",
    "checked_fields",
    "one_of",
    "plain",
    "refusal",
]

Check = Callable[[str, object], Any]
"""Takes a field's name and value, and gives the value in its plain type."""


def _integer_from(minimum: int) -> Check:
    def check(name: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < minimum:
            raise refusal(name, value, f"an integer of at least {minimum}")
        return int(value)

    return check


def _real(wanted: str, fits: Callable[[float], bool]) -> Check:
    def check(name: str, value: object) -> float:
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not number or not math.isfinite(float(value)) or not fits(float(value)):  # type: ignore[arg-type]
            raise refusal(name, value, wanted)
        return float(value)  # type: ignore[arg-type]

    return check


def _tau(name: str, value: object) -> object:
    if callable(value) or (isinstance(value, str) and value == "auto"):
        return value
    try:
        return _integer_from(1)(name, value)
    except HyperParameterError:
        wanted = 'an integer of at least 1, "auto", or a period, see commhooks.periods'
        raise refusal(name, value, wanted) from None


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise refusal(name, value, "True or False")
    return value


def _names(name: str, value: object) -> tuple[str, ...]:
    strings = isinstance(value, Sequence) and all(isinstance(each, str) for each in value)
    if isinstance(value, str) or not strings:
        raise refusal(name, value, "a sequence of strings")
    return tuple(value)  # type: ignore[arg-type]


def _fragments(name: str, value: object) -> int | tuple[tuple[str, ...], ...]:
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        for number, each in enumerate(value):
            if not _names(f"{name}[{number}]", each):
                raise refusal(f"{name}[{number}]", each, "at least one name")
        return tuple(map(tuple, value))
    return _integer_from(1)(name, value)  # type: ignore[no-any-return]


def _builder(name: str, value: object) -> Callable[[list[Tensor]], Optimizer]:
    if not callable(value):
        raise refusal(name, value, "a function that builds an optimizer from a list of parameters")
    # Here rather than at the end of warm-up.
    try:
        built = value([torch.nn.Parameter(torch.zeros(2, 2))])
    except Exception as error:
        wanted = f"a builder of a torch.optim.Optimizer (it raised {error!r})"
        raise refusal(name, value, wanted) from error
    if not isinstance(built, Optimizer):
        raise refusal(name, value, f"a builder of a torch.optim.Optimizer (it built {built!r})")
    return value


def _island(name: str, value: object) -> object:
    if isinstance(value, dist.ProcessGroup) or (isinstance(value, str) and value == "node"):
        return value
    try:
        return _integer_from(1)(name, value)
    except HyperParameterError:
        wanted = '"node", a number of ranks, this rank\'s own process group, or None'
        if isinstance(value, int) and value == dist.GroupMember.NON_GROUP_MEMBER:
            raise HyperParameterError(
                f"{name} must be {wanted}, and this rank is not a member of the group that it was "
                "given. Make the groups of all islands on every rank, as dist.new_group wants it, "
                "and give each rank its own."
            ) from None
        raise refusal(name, value, wanted) from None


IslandRanks = Annotated[Literal["node"] | int | dist.ProcessGroup, _island]
"""Which ranks make one worker."""

Steps = Annotated[int, _integer_from(1)]
"""A number of steps, at least 1."""

Tau = Annotated[int | Literal["auto"] | Callable[..., int], _tau]
"""Steps between two rounds: a number, at least 1, "auto", or a period of commhooks.periods."""

Count = Annotated[int, _integer_from(0)]
"""A number from 0."""

Unit = Annotated[float, _real("a real number in [0, 1]", lambda x: 0 <= x <= 1)]
"""A real number in [0, 1]."""

HalfOpenUnit = Annotated[float, _real("a real number in [0, 1)", lambda x: 0 <= x < 1)]
"""A real number in [0, 1)."""

Positive = Annotated[float, _real("a finite real number above 0", lambda x: x > 0)]
"""A finite real number above 0."""

Flag = Annotated[bool, _flag]
"""True or False."""

Names = Annotated[Sequence[str], _names]
"""A sequence of strings, and not a string itself."""


Fragments = Annotated[int | Sequence[Sequence[str]], _fragments]
"""A number of fragments, or the names of the parameters in each."""

Outer = Annotated[Callable[[list[Tensor]], Optimizer], _builder]
"""Builds an optimizer from a list of parameters."""


def one_of(name: str, value: object, choices: Sequence[object]) -> None:
    """Check that ``value`` is one of ``choices``.

    Raises:
        HyperParameterError: it is not.
    """
    if value not in choices:
        raise refusal(name, value, f"one of {', '.join(map(repr, choices))}")


def plain(value: object) -> object:
    """A hyper-parameter as a value that can be compared between ranks and saved."""
    if is_dataclass(value):
        return repr(value)
    if not callable(value):
        return value
    if isinstance(value, partial):
        arguments = [*map(repr, value.args), *(f"{k}={v!r}" for k, v in value.keywords.items())]
        return f"{plain(value.func)}({', '.join(arguments)})"
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', repr(value))}"


def checked_fields(state: Any) -> None:
    """Check a dataclass's fields by the types above, and give them their plain types.

    Raises:
        HyperParameterError: a field has the wrong type or lies outside its range.
    """
    cls: type = type(state)
    for name, (check, optional) in _checks(cls).items():
        value = getattr(state, name)
        if not (optional and value is None):
            setattr(state, name, check(name, value))


@cache
def _checks(cls: type) -> dict[str, tuple[Check, bool]]:
    hints = get_type_hints(cls, include_extras=True)
    found = {}
    for field in fields(cls):
        hint = hints[field.name]
        choices = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        for choice in choices:
            if get_origin(choice) is Annotated:
                found[field.name] = choice.__metadata__[0], type(None) in choices
    return found


def refusal(name: str, value: object, wanted: str) -> HyperParameterError:
    """The error for an argument that is not what it should be."""
    return HyperParameterError(
        f"{name} must be {wanted}, got {value!r} of type {type(value).__name__}."
    )
