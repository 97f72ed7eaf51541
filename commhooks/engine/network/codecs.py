"""How numbers are rounded to few bits, and packed."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

__all__ = ["BLOCK", "CODECS", "Codec"]

BLOCK = 256
"""How many numbers share a scale."""


class Codec(Protocol):
    """Rounds blocks of numbers.

    ``d`` and ``t`` are of shape (blocks, 256), of the wire's format; ``scales`` of shape (blocks,
    1), of the same; ``codes`` of shape (blocks, ``width``) and of bytes.
    """

    scaled: bool
    """Whether a block has a scale."""

    width: int
    """Bytes of a block's codes."""

    def encode(self, d: Tensor, t: Tensor, scales: Tensor, codes: Tensor) -> None:
        """Write the codes of ``d``, and leave in it what they do not hold."""

    def decode(self, t: Tensor, scales: Tensor, codes: Tensor) -> None:
        """Write what the codes stand for into ``t``."""


class _BFloat16:
    """The upper half of a number in fp32, rounded."""

    scaled = False
    width = 2 * BLOCK

    def encode(self, d: Tensor, t: Tensor, scales: Tensor, codes: Tensor) -> None:
        rounded = codes.view(torch.bfloat16)
        # What is larger than its largest number is sent in several rounds.
        limit = torch.finfo(torch.bfloat16).max
        rounded.copy_(torch.clamp(d, -limit, limit, out=t))
        d.sub_(t.copy_(rounded))

    def decode(self, t: Tensor, scales: Tensor, codes: Tensor) -> None:
        t.copy_(codes.view(torch.bfloat16))


class _Integers:
    """Multiples of a block's largest number / ``levels``, from -levels to levels."""

    scaled = True
    levels: int

    def encode(self, d: Tensor, t: Tensor, scales: Tensor, codes: Tensor) -> None:
        torch.amax(torch.abs(d, out=t), dim=1, keepdim=True, out=scales)
        # The smallest normal number keeps the reciprocal finite, and a block of zeros zero.
        scales.mul_(1.0 / self.levels).clamp_min_(torch.finfo(d.dtype).tiny)
        torch.mul(d, scales.reciprocal(), out=t).round_()
        d.addcmul_(t, scales, value=-1)
        self.pack(t, codes)

    def decode(self, t: Tensor, scales: Tensor, codes: Tensor) -> None:
        self.unpack(t, codes)
        t.mul_(scales)

    def pack(self, t: Tensor, codes: Tensor) -> None:
        """Write whole numbers as codes."""
        raise NotImplementedError

    def unpack(self, t: Tensor, codes: Tensor) -> None:
        """Read whole numbers from codes."""
        raise NotImplementedError


class _Int8(_Integers):
    levels = 127
    width = BLOCK

    def pack(self, t: Tensor, codes: Tensor) -> None:
        codes.view(torch.int8).copy_(t)

    def unpack(self, t: Tensor, codes: Tensor) -> None:
        t.copy_(codes.view(torch.int8))


class _Int4(_Integers):
    """A byte holds one number of a block's first half, plus 8, and one of its second, times 16.

    Each is a sum of two numbers then, which fits a signed byte.
    """

    levels = 7
    width = BLOCK // 2

    def pack(self, t: Tensor, codes: Tensor) -> None:
        first, second = t[:, : self.width], t[:, self.width :]
        codes.view(torch.int8).copy_(first.add_(second, alpha=16).add_(8))

    def unpack(self, t: Tensor, codes: Tensor) -> None:
        t[:, : self.width].copy_(codes & 15).sub_(8)
        # Of a signed byte the sign stays.
        t[:, self.width :].copy_(codes.view(torch.int8) >> 4)


CODECS: dict[str, Codec] = {"bf16": _BFloat16(), "int8": _Int8(), "int4": _Int4()}
