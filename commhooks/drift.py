"""How far each parameter has drifted, as a table."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["DriftTable", "ParameterDrift"]


class ParameterDrift(NamedTuple):
    """One parameter over all workers, z being what they have in common.

    Attributes:
        name: as in ``module.named_parameters()``.
        relative_drift: rms over workers of ||x_i - z||, divided by ||z||; inf if z is 0.
        agreement: ||mean (x_i - z)|| over the mean of ||x_i - z||; 0 if nothing moved.
        distance: rms over workers of ||x_i - z||.
        norm: ||z||.
    """

    name: str
    relative_drift: float
    agreement: float
    distance: float
    norm: float


class DriftTable(tuple[ParameterDrift, ...]):
    """Parameters, the one with the largest relative drift first; prints as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        width = max([len("parameter"), *(len(row.name) for row in self)])
        head = f"{'parameter':{width}}  relative drift  agreement   distance       norm"
        lines = [
            f"{row.name:{width}}  {row.relative_drift:14.3g}  {row.agreement:9.3f}  "
            f"{row.distance:9.3g}  {row.norm:9.3g}"
            for row in self
        ]
        return "\n".join([head, *lines])
