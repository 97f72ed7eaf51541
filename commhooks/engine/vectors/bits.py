"""Numbers that stand for the bits of tensors, to compare what ranks hold without sending it."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from commhooks.engine.vectors.chunks import real

__all__ = ["combined", "fingerprint", "numbers", "ordered_fingerprint"]

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Numbers that are read at once: few enough for a cache, enough for a launch.
_STRETCH = 2**16
_PRIME = 0x9E3779B97F4A7C15
_64_BITS = 2**64 - 1


def combined(fingerprints: Iterable[int]) -> int:
    """One number for several, in their order."""
    total = 0
    for each in fingerprints:
        total = (total * _PRIME + each) & _64_BITS
    return total


def fingerprint(tensor: Tensor) -> Tensor:
    """The sum of a tensor's numbers, read as integers, as an int64 scalar."""
    width = tensor.element_size()
    # It may wrap around. In int64, torch would first make a copy of all of them that is twice as
    # large, and the C library does not use the same memory for the next tensor's.
    total = tensor.view(_INTEGERS[width]).sum(dtype=torch.int64 if width == 8 else torch.int32)
    return total.to(torch.int64)


def numbers(tensor: Tensor) -> Tensor:
    """The numbers of a tensor as real ones, in the order of its indices."""
    return real(tensor.detach().resolve_conj().resolve_neg()).reshape(-1)


def ordered_fingerprint(tensor: Tensor) -> int:
    """A number that stands for a tensor's bits and their order, whatever its memory looks like."""
    total = 0
    for part in torch.split(numbers(tensor).view(torch.uint8), 4 * _STRETCH):
        words = nn.functional.pad(part, (0, -len(part) % 4)).view(torch.int32)
        # In int64, since sign bits would vanish from products of 32 bits.
        mixed = words.to(torch.int64).mul_(_weights(words.device)[: len(words)]).sum()
        total = (total * _PRIME + int(mixed)) & _64_BITS
    return total


@functools.cache
def _weights(device: torch.device) -> Tensor:
    """Odd-looking factors, the same on every rank, that tell the places of a stretch apart."""
    random = torch.Generator().manual_seed(0)
    return torch.randint(-(2**62), 2**62, (_STRETCH,), generator=random, device="cpu").to(device)
