"""Cache-sized stretches of a model: what the rules are given at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["Chunk", "Gathered", "Scratch", "cut", "is_dense", "real", "window"]


def is_dense(tensor: Tensor) -> bool:
    """Whether the tensor's numbers fill one stretch of memory, in whatever order."""
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda d: d[1]):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def real(tensor: Tensor) -> Tensor:
    """The tensor's numbers as real ones, outside autograd; complex ones get a last dimension."""
    detached = tensor.detach()
    return torch.view_as_real(detached) if detached.is_complex() else detached


def window(tensors: Sequence[Tensor], start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
    """What lies between two numbers of tensors laid end to end.

    Yields:
        Each tensor of which a part does, and that part: of the tensor's own shape if all of it
        does, else flat. A tensor that is not dense cannot be cut.
    """
    begin = 0
    for tensor in tensors:
        numbers = real(tensor)
        end = begin + numbers.numel()
        first, last = max(begin, start), min(end, stop)
        if (first, last) == (begin, end):
            yield tensor, numbers
        elif first < last:
            flat = numbers.as_strided((numbers.numel(),), (1,))
            yield tensor, flat[first - begin : last - begin]
        begin = end


class Chunk:
    """A stretch of tensors laid end to end.

    Attributes:
        start, stop: where the stretch lies.
        pieces: views of the tensors (or parts of them) that lie in the stretch, in order.
    """

    def __init__(self, start: int, pieces: Sequence[Tensor]) -> None:
        self.start = start
        self.pieces = list(pieces)
        self.stop = start + sum(piece.numel() for piece in pieces)

    def views(self, flat: Tensor) -> list[Tensor]:
        """``flat``, as long as the stretch, cut and shaped like :attr:`pieces`."""
        parts = torch.split(flat, [piece.numel() for piece in self.pieces])
        return [part.view(piece.shape) for part, piece in zip(parts, self.pieces, strict=True)]


def cut(tensors: Sequence[Tensor], limit: int | None) -> Iterator[Chunk]:
    """Cut tensors, laid end to end, into chunks of up to ``limit`` numbers, or one if it is None.

    A tensor of some size gets chunks of its own, which need not be gathered; small ones share
    theirs. A tensor that is not dense cannot be cut, and may make its chunk longer.
    """
    start, length = 0, 0
    pieces: list[Tensor] = []
    for tensor in tensors:
        rest = real(tensor)
        numel = rest.numel()
        dense = is_dense(rest)
        if dense:
            rest = rest.as_strided((numel,), (1,))
        alone = limit is not None and dense and numel >= limit // 4
        if pieces and (alone or (limit is not None and length + numel > limit)):
            yield Chunk(start, pieces)
            start, length, pieces = start + length, 0, []
        if alone and limit is not None:
            for part in rest.chunk(-(-numel // limit)):
                yield Chunk(start, [part])
                start += part.numel()
        else:
            pieces.append(rest)
            length += numel
    if pieces:
        yield Chunk(start, pieces)


class Scratch:
    """Two vectors to compute a chunk in, shared by all buckets of a kind.

    Args:
        length: of the longest chunk.
        dtype: format of the vectors.
        device: where they are.
    """

    def __init__(self, length: int, dtype: torch.dtype, device: torch.device) -> None:
        self._shape = (2, length)
        self._dtype = dtype
        self._device = device
        self._rows: Tensor | None = None

    def rows(self, length: int) -> tuple[Tensor, Tensor]:
        """Both vectors, cut to ``length``; made when first asked for."""
        if self._rows is None:
            self._rows = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        x, spare = self._rows[:, :length]
        return x, spare


class Gathered:
    """A chunk's numbers in a flat vector: in place where they lie flat already, else a copy.

    Args:
        chunk: where the numbers are.
        scratch: room to compute in.
        vectors: a bucket's vectors, by name.
        common: what the ranks of an island put together, from where the chunk's stretch begins.
        copied: whether ``x`` is a copy even where the numbers lie flat.

    Attributes:
        x: the numbers, flat; a copy, or themselves.
        spare: room for as many, to compute in without allocating.
        vectors: the slices of the vectors that go with them.
        common: the same of the common vector, where there is one.
    """

    def __init__(
        self,
        chunk: Chunk,
        scratch: Scratch,
        vectors: Mapping[str, Tensor],
        common: Tensor | None = None,
        *,
        copied: bool = False,
    ) -> None:
        self.x, self.spare = scratch.rows(chunk.stop - chunk.start)
        self.vectors = {name: flat[chunk.start : chunk.stop] for name, flat in vectors.items()}
        self._pieces = chunk.pieces
        self._views: list[Tensor] | None = None
        first = chunk.pieces[0]
        self.common = None if common is None else common[chunk.start : chunk.stop]
        flat = len(chunk.pieces) == 1 and first.is_contiguous() and first.dtype == self.x.dtype
        if flat and not copied:
            self.x = first.view(-1)
        else:
            self._views = chunk.views(self.x)

    def gather(self) -> None:
        """Fetch the numbers into ``x``."""
        if self._views is not None:
            torch._foreach_copy_(self._views, self._pieces)

    def write_back(self) -> None:
        """Copy ``x`` to where it came from."""
        if self._views is not None:
            torch._foreach_copy_(self._pieces, self._views)

    def offer(self) -> None:
        """Copy ``x`` to :attr:`common`."""
        assert self.common is not None
        self.common.copy_(self.x)

    def blend(self, weight: float, out: Tensor) -> Tensor:
        """weight x + :attr:`common`, in ``out``, to the same bits on all ranks.

        What becomes of a number does not depend on how its rank cuts the shares: a product and a
        sum, each rounded, and not a ``lerp`` or a sum with a factor, of which a CPU may round the
        last numbers of a chunk in another way than the others.
        """
        assert self.common is not None
        if weight == 0:
            return out.copy_(self.common)
        return torch.mul(self.x, weight, out=out).add_(self.common)
