"""How far a worker's parameters are from the others', measured where they are read anyway."""

from __future__ import annotations

import torch
from torch import Tensor

from commhooks.engine.vectors.buckets import Bucket
from commhooks.engine.vectors.chunks import Gathered
from commhooks.engine.vectors.devices import HostCopy, squared_norm

__all__ = ["Drift", "stride_for"]

# At most so many numbers of a fragment are looked at, spread evenly over all of it.
_LOOKED_AT = 2**16


def stride_for(numel: int) -> int:
    """Every how many-th number of ``numel`` is looked at: an odd number, 1 for a small fragment.

    Odd, since the sizes of layers are multiples of powers of two, and the same column of every
    row says little about the others.
    """
    return -(-numel // _LOOKED_AT) | 1


class Drift:
    """Squared norms over one bucket, of every k-th number, as scalars.

    z is what all workers have in common before a launch, or what a landing draws to; x are the
    worker's parameters before either, and c is what it contributes. Where the wire holds z, a
    launch overwrites it, so some of it is kept.

    Args:
        bucket: the parameters.
        reference: name of the vector that holds z.
        differences: whether c is a difference to z already.
        stride: k.

    Attributes:
        length: ||z||^2 at the last launch or landing.
        apart: ||x - z||^2 then.
        moved: ||c - z||^2 at the last launch.
    """

    def __init__(self, bucket: Bucket, reference: str, *, differences: bool, stride: int) -> None:
        self._bucket = bucket
        self._reference = reference
        self._differences = differences
        self._stride = stride
        length = -(-bucket.length // stride)
        self._z, self._x = torch.zeros(2, length, dtype=bucket.dtype, device=bucket.device)
        self.length = self.apart = self.moved = torch.zeros(())
        # Of every chunk, itself, its numbers that are looked at, and where they are copied to.
        self._picked: list[tuple[Gathered, Tensor, Tensor]] = []
        self._chunk = self._at = 0

    def begin(self) -> None:
        """A launch or a landing begins."""
        self._chunk = self._at = 0
        self._z.copy_(self._picked_of(self._reference))

    def before(self, chunk: Gathered) -> None:
        """A chunk's parameters before the rules; chunks come in the order of the bucket."""
        number, self._chunk = self._chunk, self._chunk + 1
        begin, self._at = self._at, self._at + len(chunk.x)
        # The bucket makes new chunks where parameters have moved.
        if number == len(self._picked) or self._picked[number][0] is not chunk:
            first = -(-begin // self._stride)
            numbers = chunk.x[first * self._stride - begin :: self._stride]
            room = self._x[first : first + len(numbers)]
            self._picked[number:] = [(chunk, numbers, room)]
        _, numbers, room = self._picked[number]
        room.copy_(numbers)

    def compare(self) -> None:
        """All chunks have been seen."""
        self.length = squared_norm(self._z)
        self.apart = squared_norm(self._x.sub_(self._z))

    def contributed(self, divisor: int) -> None:
        """The rules have written what is sent.

        Args:
            divisor: it has been divided by that.
        """
        torch.mul(self._picked_of("wire"), divisor, out=self._x)
        self.moved = self._move()

    def together(self) -> HostCopy:
        """||mean c - z||^2, once the wire holds the mean. Runs on the backend's thread."""
        self._x.copy_(self._picked_of("wire"))
        return HostCopy(self._move())

    def _move(self) -> Tensor:
        return squared_norm(self._x if self._differences else self._x.sub_(self._z))

    def _picked_of(self, name: str) -> Tensor:
        return self._bucket.vectors[name][:: self._stride]
