"""Whether a model's parameters were written to by somebody that no hook tells of."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

__all__ = ["Writes"]

# One number of each of so many parameters is looked at, the largest ones.
_LOOKED_AT = 64


class Writes:
    """Notices that parameters have changed since :meth:`settle`.

    torch counts what is written to a tensor, but for writes by way of ``.data``. Weights that were
    exchanged for others and put back bit for bit (for those of an average over time, say) have been
    written to, and have not changed: a few numbers of them tell.

    Args:
        parameters: whose writes torch counts.
        numbers: the same parameters as plain tensors, which share their memory.
    """

    def __init__(self, parameters: Sequence[Tensor], numbers: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        self._places = {id(parameter): place for place, parameter in enumerate(parameters)}
        like = numbers[0]
        kin = {
            number: tensor
            for number, tensor in enumerate(numbers)
            if tensor.numel() and (tensor.device, tensor.dtype) == (like.device, like.dtype)
        }
        largest = sorted(kin, key=lambda number: kin[number].numel(), reverse=True)[:_LOOKED_AT]
        self._looked_at = {number: kin[number] for number in largest}
        self._views: list[Tensor] = []
        self._addresses: list[int] = []
        self._in_steps = False
        self.settle()

    def belong_to_steps(self) -> None:
        """What has been written is a part of every step, and not to be found any more.

        Some layers write to their weights in the forward, some optimizers in the backward and for a
        while behind it, and some loops clip the weights after every step.
        """
        self._in_steps = True

    def settle(self, parameters: Sequence[Tensor] | None = None) -> None:
        """What has been written until now is known, of all parameters or of some."""
        if parameters is None:
            self._counts = self._count()
            self._numbers = self._look()
            return
        places = [self._places[id(parameter)] for parameter in parameters]
        for place, parameter in zip(places, parameters, strict=True):
            self._counts[place] = parameter._version
        if not self._looked_at.keys().isdisjoint(places):
            self._numbers = self._look()

    @property
    def touched(self) -> bool:
        """Whether something has been written since, be it what was there before."""
        return not self._in_steps and self._count() != self._counts

    @property
    def found(self) -> bool:
        """Whether what has been written is something else, and no part of every step."""
        return self.touched and self.changed

    @property
    def changed(self) -> bool:
        """Whether parameters are other ones. Fused optimizers change them and are not counted."""
        pairs = enumerate(zip(self._count(), self._counts, strict=True))
        written = {number for number, (now, before) in pairs if now != before}
        unknown = bool(written) and written.isdisjoint(self._looked_at)
        now = self._look()
        alike = now.dtype == self._numbers.dtype and torch.equal(now, self._numbers)
        return unknown or not alike

    def _count(self) -> list[int]:
        return list(map(attrgetter("_version"), self._parameters))

    def _look(self) -> Tensor:
        addresses = [tensor.data_ptr() for tensor in self._looked_at.values()]
        if addresses != self._addresses:
            # Somebody has moved a parameter (``tensor.data = ...``).
            self._addresses = addresses
            self._views = [
                tensor.detach()[tuple(size // 2 for size in tensor.shape)]
                for tensor in self._looked_at.values()
            ]
        return torch.stack(self._views) if self._views else torch.empty(0)
