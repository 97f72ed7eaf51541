"""Everything that differs between devices and number formats."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = [
    "HostCopy",
    "Moment",
    "accumulation_dtype",
    "catch_up_with_callbacks",
    "chunk_numel",
    "finiteness",
    "keep_for_this_stream",
    "side_stream",
    "squared_norm",
]

# What a rule touches together should stay in a core's own cache from its first operation to its
# last, and an operation should take longer than its call; 128 Ki fp32 numbers are 512 KiB.
_CPU_CHUNK_NUMEL = 128 * 1024


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


def finiteness(x: Tensor) -> Tensor:
    """A scalar that is finite if all of ``x`` is, and NaN or inf if not; it may be any number.

    On a CPU the plain sum tells most of the time, in the one pass that reads memory anyway. Large
    numbers may overflow it though each of them is finite.
    """
    if x.device.type == "cpu":
        plain = x.sum()
        return plain if math.isfinite(plain.item()) else (x * 0).sum()
    if not x.numel():
        return x.new_zeros(())
    smallest, largest = torch.aminmax(x)
    probe: Tensor = smallest * 0 + largest * 0
    return probe


def squared_norm(x: Tensor) -> Tensor:
    """The sum of squares, a scalar: in the format of ``x`` on a CPU unless that overflows."""
    if x.device.type == "cpu":
        plain = torch.dot(x, x)
        if math.isfinite(plain.item()):
            return plain
    norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)
    return norm.square()


class Moment:
    """A point in time: on a CPU now, on a GPU when its current stream gets there.

    Args:
        device: whose work it is a point in.
    """

    def __init__(self, device: torch.device) -> None:
        self._seconds = time.perf_counter()
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(device))

    @property
    def passed(self) -> bool:
        """Whether it lies in the past."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def seconds_since(self, earlier: Moment) -> float:
        """Seconds from ``earlier`` to this moment; blocks the host until both have passed."""
        if self._event is None or earlier._event is None:
            return self._seconds - earlier._seconds
        earlier._event.synchronize()
        self._event.synchronize()
        return float(earlier._event.elapsed_time(self._event)) / 1e3


class HostCopy:
    """A small tensor's numbers on the host, without waiting for what else its device computes.

    Args:
        tensor: read on the current stream, from when this one is made.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._numbers = tensor
        self._event: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._numbers = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._numbers.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(tensor.device))

    def read(self) -> Tensor:
        """The numbers, once they have been copied."""
        if self._event is not None:
            self._event.synchronize()
        return self._numbers


def keep_for_this_stream(tensors: Iterable[Tensor]) -> None:
    """Keep tensors' memory from being given away before the current stream is through with it."""
    for tensor in tensors:
        if tensor.device.type == "cuda":
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Let what waits inside the block wait on a stream of its own, and not the current one."""
    if device.type != "cuda":
        yield
        return
    if device not in _side_streams:
        _side_streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(_side_streams[device]):
        yield


_side_streams: dict[torch.device, torch.cuda.Stream] = {}


def catch_up_with_callbacks(device: torch.device) -> None:
    """Let the current stream wait for what a backend's own thread has queued.

    gloo's futures know no streams: what is chained to them runs on the default stream.
    """
    if device.type == "cuda":
        default = torch.cuda.default_stream(device)
        torch.cuda.current_stream(device).wait_stream(default)
