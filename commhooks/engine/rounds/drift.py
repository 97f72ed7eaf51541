"""How far the workers' models move apart between two rounds, measured where they meet anyway."""

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

    z is what all workers have in common before a launch, x the worker's parameters, and c what it
    contributes. Where the wire holds z, the launch overwrites it, so some of it is kept.

    Args:
        bucket: the parameters.
        reference: name of the vector that holds z.
        differences: whether c is a difference to z already.
        stride: k.

    Attributes:
        apart: parts of ||x - z||^2.
        moved: parts of ||c - z||^2.
    """

    def __init__(self, bucket: Bucket, reference: str, *, differences: bool, stride: int) -> None:
        self._bucket = bucket
        self._reference = reference
        self._differences = differences
        self._stride = stride
        length = -(-bucket.length // stride)
        self._z, self._difference = torch.zeros(2, length, dtype=bucket.dtype, device=bucket.device)
        self.apart: list[Tensor] = []
        self.moved: list[Tensor] = []
        self._at = 0

    def begin(self) -> Tensor:
        """A launch begins; ||z||^2."""
        self.apart, self.moved, self._at = [], [], 0
        self._z.copy_(self._bucket.vectors[self._reference][:: self._stride])
        return squared_norm(self._z)

    def before(self, chunk: Gathered) -> None:
        """A chunk's parameters before the rules; chunks come in the order of the bucket."""
        self.apart.append(self._square(chunk.x, self._z))

    def after(self, chunk: Gathered) -> None:
        """What the rules have made of the chunk."""
        z = None if self._differences else self._z
        self.moved.append(self._square(chunk.vectors["wire"], z))
        self._at += len(chunk.x)

    def together(self) -> HostCopy:
        """||mean c - z||^2, once the wire holds the mean. Runs on the backend's thread."""
        mean = self._bucket.vectors["wire"][:: self._stride]
        if self._differences:
            self._difference.copy_(mean)
        else:
            torch.sub(mean, self._z, out=self._difference)
        return HostCopy(squared_norm(self._difference))

    def _square(self, numbers: Tensor, z: Tensor | None) -> Tensor:
        begin = -(-self._at // self._stride)
        picked = numbers[begin * self._stride - self._at :: self._stride]
        difference = self._difference[: len(picked)]
        if z is None:
            difference.copy_(picked)
        else:
            torch.sub(picked, z[begin : begin + len(picked)], out=difference)
        return squared_norm(difference)
