"""How a list of tensors lies in flat buckets, and how numbers get from the one to the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from commhooks.engine.vectors.bits import combined, fingerprint, ordered_fingerprint
from commhooks.engine.vectors.chunks import Chunk, Gathered, Scratch, cut, is_dense, real, window
from commhooks.engine.vectors.devices import (
    accumulation_dtype,
    catch_up_with_callbacks,
    chunk_numel,
)
from commhooks.errors import RegistrationError

__all__ = ["Bucket", "build_buckets"]

_NONE: Mapping[str, Tensor] = {}


class Bucket:
    """Tensors on one device that are averaged in one flat vector, and the vectors that go with it.

    The flat order of a dense tensor is that of its memory, so that channels_last and transposed
    parameters copy as fast as others; ranks must agree on strides, and registration checks it.

    The ranks of an island share a bucket out: each has vectors of its share alone, writes what
    comes of that to :attr:`common`, and takes the rest from the others. Where they do so ahead of a
    landing, the landing is computed in place; else on copies, since nothing may be written before
    all of it is there.

    Args:
        tensors: what lies in the bucket, in order.
        scratch: where chunks are computed.
        edges: where the shares begin, and where the last one ends.
        share: the number of this rank's.
        ahead: whether the shares are put together ahead of a landing.

    Attributes:
        edges, ahead: as given.
        start, stop: where this rank's share lies.
        numel: length of the bucket.
        length: length of the share, and so of the vectors.
        dtype: their format, see :func:`commhooks.engine.vectors.devices.accumulation_dtype`.
        device: where they are.
        vectors: flat vectors of length ``length`` by name, once :meth:`allocate` has made them.
        slices: the same, cut into chunks.
        common: a flat vector of length ``numel`` to gather all shares in; None if there is one.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        scratch: Scratch,
        edges: Sequence[int] | None = None,
        share: int = 0,
        *,
        ahead: bool = False,
    ) -> None:
        self.tensors = list(tensors)
        self.ahead = ahead
        self.device = tensors[0].device
        self.dtype = accumulation_dtype(tensors[0].dtype)
        self.numel = sum(real(tensor).numel() for tensor in tensors)
        self.edges = list(edges or (0, self.numel))
        self.start, self.stop = self.edges[share : share + 2]
        self.length = self.stop - self.start
        self.vectors: dict[str, Tensor] = {}
        self.slices: list[dict[str, Tensor]] = []
        self.common: Tensor | None = None
        self._scratch = scratch
        self._described = [_describe(tensor) for tensor in tensors]
        self._addresses: list[int] = []
        self._chunks: list[Chunk] = []
        self._gathered: list[Gathered] = []
        self._rest: list[Gathered] = []

    @property
    def shared(self) -> bool:
        """Whether it is shared out."""
        return len(self.edges) > 2

    @property
    def copied(self) -> bool:
        """Whether a landing is computed on copies."""
        return self.shared and not self.ahead

    @property
    def nbytes(self) -> int:
        """Bytes of one flat vector."""
        return self.length * self.dtype.itemsize

    @property
    def memory(self) -> list[Tensor]:
        """All that rules write to besides the parameters."""
        return [*self.vectors.values(), *([] if self.common is None else [self.common])]

    @property
    def owned(self) -> list[Tensor]:
        """The tensors of which some lies in the share."""
        return [tensor for tensor, _ in window(self.tensors, self.start, self.stop)]

    def allocate(self, names: Iterable[str]) -> None:
        """Make zeroed flat vectors of the given names."""
        for name in names:
            self.vectors[name] = torch.zeros(self.length, dtype=self.dtype, device=self.device)
        limit = chunk_numel(self.device) or max(1, self.length)
        self.slices = [
            {name: flat[start : start + limit] for name, flat in self.vectors.items()}
            for start in range(0, self.length, limit)
        ]
        self._addresses = []

    def release(self) -> None:
        """Let go of the flat vectors."""
        self.vectors, self.slices, self._addresses = {}, [], []
        self._gathered, self._rest = [], []
        self.common = None

    def gathered(self) -> Iterator[Gathered]:
        """Go through the share chunk by chunk; chunks share their scratch vectors."""
        self.refresh()
        for chunk in self._gathered:
            chunk.gather()
            yield chunk

    def gather_share(self, flat: Tensor) -> None:
        """Copy the share into ``flat``, of length :attr:`length`."""
        begin = 0
        for chunk in self.gathered():
            flat[begin : begin + len(chunk.x)].copy_(chunk.x)
            begin += len(chunk.x)

    def gather(self, flat: Tensor) -> None:
        """Copy the tensors into ``flat``, of length :attr:`numel`."""
        self.refresh()
        for chunk in self._chunks:
            torch._foreach_copy_(chunk.views(flat[chunk.start : chunk.stop]), chunk.pieces)

    def scatter(self, flat: Tensor) -> None:
        """Copy ``flat``, of length :attr:`numel`, into the tensors."""
        for chunk in self._chunks:
            torch._foreach_copy_(chunk.pieces, chunk.views(flat[chunk.start : chunk.stop]))

    def sent_by(self, broadcast: Callable[[Tensor], torch.futures.Future[Any]]) -> Tensor:
        """The tensors of the rank that ``broadcast`` sends from, for :meth:`scatter`. Collective.

        Raises:
            RuntimeError: a rank is gone.
        """
        flat = torch.empty(self.numel, dtype=self.dtype, device=self.device)
        with torch.no_grad():
            self.gather(flat)
        broadcast(flat).wait()
        catch_up_with_callbacks(self.device)
        return flat

    def mix_in_rest(self, weight: float) -> None:
        """x <- weight x + :attr:`common` for all that lies in the shares of other ranks."""
        for chunk in self._rest:
            if weight:
                chunk.gather()
            chunk.blend(weight, out=chunk.x)
            chunk.write_back()

    def take_common(self) -> None:
        """x <- :attr:`common`."""
        assert self.common is not None
        self.scatter(self.common)

    def swap(self, flat: Tensor) -> None:
        """Exchange the tensors' numbers with those in ``flat``, of length :attr:`numel`.

        No memory is asked for, and nothing is lost of tensors of a smaller format.
        """
        self.refresh()
        for chunk in self._chunks:
            other = flat[chunk.start : chunk.stop]
            mine = Gathered(chunk, self._scratch, {})
            mine.gather()
            mine.spare.copy_(mine.x)
            mine.x.copy_(other)
            mine.write_back()
            other.copy_(mine.spare)

    def parts(self, flat: Tensor) -> list[Tensor]:
        """Views of the parts of ``flat``, of length :attr:`length`, one a tensor in the share.

        They have the tensors' own shapes, or are flat where a part of the tensor is in another
        share. Complex tensors give real ones with a last dimension of two.
        """
        alike = [like for _, like in window(self.tensors, self.start, self.stop)]
        return [
            part.as_strided(like.shape, like.stride(), part.storage_offset())
            if is_dense(like)
            else part.view(like.shape)
            for part, like in zip(
                torch.split(flat, [like.numel() for like in alike]), alike, strict=True
            )
        ]

    def fingerprint(self) -> Tensor:
        """A number that is the same for tensors of the same bits, as an int64 scalar."""
        return torch.stack([fingerprint(real(tensor)) for tensor in self.tensors]).sum()

    def ordered_fingerprint(self) -> int:
        """The same on the host; the same numbers in another order have another one."""
        return combined(ordered_fingerprint(real(tensor)) for tensor in self.tensors)

    def refresh(self) -> None:
        """Rebuild the views if somebody has moved a tensor (``tensor.data = ...``) since.

        Raises:
            RegistrationError: a tensor is not what it was.
        """
        addresses = [tensor.data_ptr() for tensor in self.tensors]
        if addresses == self._addresses:
            return
        for tensor, described in zip(self.tensors, self._described, strict=True):
            if _describe(tensor) != described:
                raise RegistrationError(
                    "A parameter changed its shape, strides, dtype or device from "
                    f"{described} to {_describe(tensor)} after registration; convert the model "
                    "before wrapping it in DistributedDataParallel."
                )
        self._chunks = list(cut(self.tensors, chunk_numel(self.device)))
        if self.shared and self.common is None:
            self.common = torch.empty(self.numel, dtype=self.dtype, device=self.device)
        self._gathered = self._stretch(self.start, self.stop, self.vectors)
        if self.ahead:
            self._rest = [*self._stretch(0, self.start), *self._stretch(self.stop, self.numel)]
        self._addresses = addresses

    def _stretch(
        self, start: int, stop: int, vectors: Mapping[str, Tensor] = _NONE
    ) -> list[Gathered]:
        """The chunks between two numbers; ``vectors`` are as long."""
        parts = [part for _, part in window(self.tensors, start, stop)]
        common = None if self.common is None else self.common[start:stop]
        return [
            Gathered(chunk, self._scratch, vectors, common, copied=self.copied)
            for chunk in cut(parts, chunk_numel(self.device))
        ]


def build_buckets(
    tensors: Iterable[Tensor],
    cap_bytes: float,
    shares: int = 1,
    share: int = 0,
    *,
    cuttable: bool = True,
    ahead: bool = False,
) -> list[Bucket]:
    """Group tensors by device and averaging format, then pack them in order up to ``cap_bytes``.

    A tensor larger than the cap gets a bucket of its own; none is left out.

    Args:
        tensors: what is averaged.
        cap_bytes: size of a share of a bucket.
        shares: how many ranks share each bucket out.
        share: the number of this one's.
        cuttable: whether a tensor may lie in several shares; if not, every bucket is one rank's.
        ahead: whether the shares are put together ahead of a landing.
    """
    make = partial(Bucket, share=share, ahead=ahead)
    tensors = [tensor for tensor in tensors if tensor.numel()]
    if cuttable or shares == 1:
        return _build(tensors, cap_bytes * shares, partial(_even, shares=shares), make)
    dealt: list[list[Tensor]] = [[] for _ in range(shares)]
    for tensor in tensors:
        min(dealt, key=lambda mine: sum(each.numel() for each in mine)).append(tensor)
    buckets = []
    for owner, mine in enumerate(dealt):
        edges = partial(_all_of_one, owner=owner, shares=shares)
        buckets += _build(mine, cap_bytes, edges, make)
    return buckets


def _build(
    tensors: Sequence[Tensor],
    cap_bytes: float,
    edges: Callable[[Sequence[Tensor]], list[int]],
    make: Callable[[Sequence[Tensor], Scratch, Sequence[int]], Bucket],
) -> list[Bucket]:
    # In order of first appearance, so that every rank gets the same order whatever its device is.
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        kind = tensor.device, accumulation_dtype(tensor.dtype)
        groups.setdefault(kind, []).append(tensor)
    buckets: list[Bucket] = []
    for (device, dtype), group in groups.items():
        packed = list(_pack(group, cap_bytes))
        limit = chunk_numel(device)
        chunks = (chunk for part in packed for chunk in cut(part, limit))
        longest = max(chunk.stop - chunk.start for chunk in chunks)
        # A share may put together what the whole has apart, up to the limit.
        largest = max(sum(real(tensor).numel() for tensor in part) for part in packed)
        scratch = Scratch(max(longest, min(limit or 0, largest)), dtype, device)
        buckets.extend(make(part, scratch, edges(part)) for part in packed)
    return buckets


def _even(tensors: Sequence[Tensor], shares: int) -> list[int]:
    """Edges of near equal shares, moved to where a tensor ends that cannot be cut."""
    ends = [0]
    for tensor in tensors:
        ends.append(ends[-1] + real(tensor).numel())
    edges = [ends[-1] * number // shares for number in range(shares + 1)]
    for tensor, begin, end in zip(tensors, ends, ends[1:], strict=False):
        if not is_dense(real(tensor)):
            nearest = {e: begin if e - begin < end - e else end for e in edges if begin < e < end}
            edges = [nearest.get(edge, edge) for edge in edges]
    return edges


def _all_of_one(tensors: Sequence[Tensor], owner: int, shares: int) -> list[int]:
    """Edges of shares that are all empty but one."""
    numel = sum(real(tensor).numel() for tensor in tensors)
    return [0] * (owner + 1) + [numel] * (shares - owner)


def _pack(tensors: Iterable[Tensor], cap_bytes: float) -> Iterator[list[Tensor]]:
    pending: list[Tensor] = []
    size = 0
    for tensor in tensors:
        nbytes = real(tensor).numel() * accumulation_dtype(tensor.dtype).itemsize
        if pending and size + nbytes > cap_bytes:
            yield pending
            pending, size = [], 0
        pending.append(tensor)
        size += nbytes
    if pending:
        yield pending


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.stride()} {tensor.dtype} {tensor.device}"
