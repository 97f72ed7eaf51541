"""How a list of tensors lies in flat buckets, and how numbers get from the one to the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from commhooks.engine.vectors.chunks import Chunk, Gathered, Scratch, cut, is_dense, real
from commhooks.engine.vectors.devices import accumulation_dtype, chunk_numel
from commhooks.errors import RegistrationError

__all__ = ["Bucket", "build_buckets"]


class Bucket:
    """Tensors on one device that are averaged in one flat vector, and the vectors that go with it.

    The flat order of a dense tensor is that of its memory, so that channels_last and transposed
    parameters copy as fast as others; ranks must agree on strides, and registration checks it.

    Args:
        tensors: what lies in the bucket, in order.
        scratch: where chunks are computed.

    Attributes:
        numel: length of the bucket's flat vectors.
        dtype: their format, see :func:`commhooks.engine.vectors.devices.accumulation_dtype`.
        device: where they are.
        vectors: flat vectors of length ``numel`` by name, once :meth:`allocate` has made them.
        slices: the same, cut into chunks.
    """

    def __init__(self, tensors: Sequence[Tensor], scratch: Scratch) -> None:
        self.tensors = list(tensors)
        self.device = tensors[0].device
        self.dtype = accumulation_dtype(tensors[0].dtype)
        self.numel = sum(real(tensor).numel() for tensor in tensors)
        self.vectors: dict[str, Tensor] = {}
        self.slices: list[dict[str, Tensor]] = []
        self._scratch = scratch
        self._described = [_describe(tensor) for tensor in tensors]
        self._addresses: list[int] = []
        self._chunks: list[Chunk] = []
        self._gathered: list[Gathered] = []

    @property
    def nbytes(self) -> int:
        """Bytes of one flat vector."""
        return self.numel * self.dtype.itemsize

    def allocate(self, names: Iterable[str]) -> None:
        """Make zeroed flat vectors of the given names."""
        for name in names:
            self.vectors[name] = torch.zeros(self.numel, dtype=self.dtype, device=self.device)
        limit = chunk_numel(self.device) or self.numel
        self.slices = [
            {name: flat[start : start + limit] for name, flat in self.vectors.items()}
            for start in range(0, self.numel, limit)
        ]
        self._addresses = []

    def release(self) -> None:
        """Let go of the flat vectors."""
        self.vectors, self.slices, self._addresses, self._gathered = {}, [], [], []

    def gathered(self) -> Iterator[Gathered]:
        """Go through the bucket chunk by chunk; chunks share their scratch vectors."""
        self.refresh()
        for gathered in self._gathered:
            gathered.gather()
            yield gathered

    def gather(self, flat: Tensor) -> None:
        """Copy the tensors into ``flat``, of length :attr:`numel`."""
        self.refresh()
        for chunk in self._chunks:
            torch._foreach_copy_(chunk.views(flat[chunk.start : chunk.stop]), chunk.pieces)

    def swap(self, flat: Tensor) -> None:
        """Exchange the tensors' numbers with those in ``flat``, of length :attr:`numel`.

        No memory is asked for, and nothing is lost of tensors of a smaller format.
        """
        begin = 0
        for chunk in self.gathered():
            other = flat[begin : begin + len(chunk.x)]
            begin += len(chunk.x)
            chunk.spare.copy_(chunk.x)
            chunk.x.copy_(other)
            chunk.write_back()
            other.copy_(chunk.spare)

    def parts(self, flat: Tensor) -> list[Tensor]:
        """Views of the parts of ``flat``, one a tensor, in the tensors' own shapes.

        Complex tensors give real ones with a last dimension of two.
        """
        shaped = [real(tensor) for tensor in self.tensors]
        return [
            part.as_strided(like.shape, like.stride(), part.storage_offset())
            if is_dense(like)
            else part.view(like.shape)
            for part, like in zip(
                torch.split(flat, [like.numel() for like in shaped]), shaped, strict=True
            )
        ]

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
        self._gathered = [Gathered(chunk, self._scratch, self.vectors) for chunk in self._chunks]
        self._addresses = addresses


def build_buckets(tensors: Iterable[Tensor], cap_bytes: float) -> list[Bucket]:
    """Group tensors by device and averaging format, then pack them in order up to ``cap_bytes``.

    A tensor larger than the cap gets a bucket of its own; none is left out.
    """
    # In order of first appearance, so that every rank gets the same order whatever its device is.
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            kind = tensor.device, accumulation_dtype(tensor.dtype)
            groups.setdefault(kind, []).append(tensor)
    buckets: list[Bucket] = []
    for (device, dtype), group in groups.items():
        packed = list(_pack(group, cap_bytes))
        chunks = (chunk for part in packed for chunk in cut(part, chunk_numel(device)))
        scratch = Scratch(max(chunk.stop - chunk.start for chunk in chunks), dtype, device)
        buckets.extend(Bucket(part, scratch) for part in packed)
    return buckets


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
