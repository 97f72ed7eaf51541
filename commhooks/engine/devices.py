"""Everything that differs between devices and number formats."""

from __future__ import annotations

import torch

__all__ = ["accumulation_dtype", "chunk_numel"]

# A chunk of the vectors a rule touches together should stay in a core's own cache from the first
# operation of the rule to its last; 64 Ki fp32 numbers are 256 KiB, and a rule touches up to five.
_CPU_CHUNK_NUMEL = 64 * 1024


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The format in which parameters of ``dtype`` are averaged: fp32, or fp64 for fp64.

    Half-precision parameters are averaged in fp32, since a mean or an anchor kept in 8 bits of
    mantissa would lose updates smaller than 1/256 of a parameter.
    """
    real = dtype.to_real() if dtype.is_complex else dtype
    return torch.float64 if real == torch.float64 else torch.float32


def chunk_numel(device: torch.device) -> int | None:
    """How many numbers the rules are given at once; None for a whole bucket.

    On a CPU a rule of several operations on a cache-sized chunk reads memory once instead of once
    an operation. On a GPU launches cost more than memory does.
    """
    return _CPU_CHUNK_NUMEL if device.type == "cpu" else None
