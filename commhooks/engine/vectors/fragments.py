"""Which parameters go into which fragment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor

from commhooks.errors import RegistrationError

__all__ = ["partition"]

# Names in an error; a large model has thousands.
_SHOWN = 3


def partition(
    parameters: Mapping[str, Tensor], fragments: int | Sequence[Sequence[str]]
) -> list[dict[str, Tensor]]:
    """Deal parameters out, each whole and to one fragment, and in the model's order within it.

    Parameters without any number are in none, since there is nothing of them to average.

    Args:
        parameters: by name, in the model's order.
        fragments: how many; each parameter then goes to the one that is smallest so far, so that
            they are near in size and layers alternate between them. Or the names, or shell
            patterns of names, of each one's parameters.

    Raises:
        RegistrationError: there are fewer parameters than fragments; or a name matches nothing, a
            parameter is in two fragments, or in none.
    """
    parameters = {name: p for name, p in parameters.items() if p.numel()}
    if isinstance(fragments, int):
        return _near_in_size(parameters, fragments)
    return _by_name(parameters, fragments)


def _near_in_size(parameters: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    if count > len(parameters):
        raise RegistrationError(
            f"The model has {len(parameters)} parameters to average, fewer than the {count} "
            "fragments asked for; a parameter is never cut."
        )
    dealt: list[dict[str, Tensor]] = [{} for _ in range(count)]
    sizes = [0] * count
    for name, parameter in parameters.items():
        # An empty fragment would have nothing to send, so they get one each first.
        smallest = min(range(count), key=lambda n: (bool(dealt[n]), sizes[n]))
        dealt[smallest][name] = parameter
        sizes[smallest] += parameter.numel()
    return dealt


def _by_name(
    parameters: Mapping[str, Tensor], fragments: Sequence[Sequence[str]]
) -> list[dict[str, Tensor]]:
    dealt: list[dict[str, Tensor]] = []
    home: dict[str, int] = {}
    for number, patterns in enumerate(fragments):
        mine = set()
        for pattern in patterns:
            matching = [name for name in parameters if fnmatchcase(name, pattern)]
            if not matching:
                raise RegistrationError(
                    f"fragments[{number}] names {pattern!r}, which is no parameter that trains; "
                    f"there are {_some(list(parameters))}."
                )
            mine |= set(matching)
        for name in sorted(mine):
            if name in home:
                raise RegistrationError(
                    f"Parameter {name!r} is in fragments {home[name]} and {number}; name each once."
                )
            home[name] = number
        dealt.append({name: p for name, p in parameters.items() if name in mine})
    if left_out := [name for name in parameters if name not in home]:
        raise RegistrationError(
            f"No fragment names {_some(left_out)}; every parameter that trains must be in one."
        )
    return dealt


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
