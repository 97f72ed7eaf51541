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
        """If something is found now, it is a part of every step, and not to be found any more.

        Some layers write to their weights in the forward, some optimizers in the backward and for a
        while behind it, and some loops clip the weights after every step.
        """
        self._in_steps |= self.found

    def settle(self) -> None:
        """What has been written until now is known."""
        self._counts = self._count()
        self._numbers = self._look()

    @property
    def found(self) -> bool:
        """Whether parameters have changed since."""
        counts = self._count()
        if self._in_steps or counts == self._counts:
            return False
        pairs = enumerate(zip(counts, self._counts, strict=True))
        written = {number for number, (now, before) in pairs if now != before}
        if written.isdisjoint(self._looked_at) or not torch.equal(self._look(), self._numbers):
            return True
        self._counts = counts
        return False

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
