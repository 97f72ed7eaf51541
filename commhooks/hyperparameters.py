"""Checks of constructor arguments: one function a kind of range, one wording for all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

from commhooks.errors import HyperParameterError

__all__ = ["closed_unit", "flag", "half_open_unit", "integer_at_least", "names", "positive_real"]


def integer_at_least(name: str, value: object, minimum: int) -> int:
    """``value`` as an int, if it is an integer (no bool, no float) of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < minimum:
        raise _refusal(name, value, f"an integer of at least {minimum}")
    return int(value)


def closed_unit(name: str, value: object) -> float:
    """``value`` as a float, if it is a real number in [0, 1]."""
    real = _finite(name, value, "a real number in [0, 1]")
    if not 0.0 <= real <= 1.0:
        raise _refusal(name, value, "a real number in [0, 1]")
    return real


def half_open_unit(name: str, value: object) -> float:
    """``value`` as a float, if it is a real number in [0, 1)."""
    real = _finite(name, value, "a real number in [0, 1)")
    if not 0.0 <= real < 1.0:
        raise _refusal(name, value, "a real number in [0, 1)")
    return real


def positive_real(name: str, value: object) -> float:
    """``value`` as a float, if it is a finite real number above 0."""
    real = _finite(name, value, "a finite real number above 0")
    if real <= 0.0:
        raise _refusal(name, value, "a finite real number above 0")
    return real


def flag(name: str, value: object) -> bool:
    """``value``, if it is a bool."""
    if not isinstance(value, bool):
        raise _refusal(name, value, "True or False")
    return value


def names(name: str, value: object) -> tuple[str, ...]:
    """``value`` as a tuple, if it is a sequence of strings (and not a string itself)."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise _refusal(name, value, "a sequence of strings")
    if not all(isinstance(each, str) for each in value):
        raise _refusal(name, value, "a sequence of strings")
    return tuple(value)


def _finite(name: str, value: object, wanted: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(float(value)):
        raise _refusal(name, value, wanted)
    return float(value)


def _refusal(name: str, value: object, wanted: str) -> HyperParameterError:
    return HyperParameterError(
        f"{name} must be {wanted}, got {value!r} of type {type(value).__name__}."
    )
