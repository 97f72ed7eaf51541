"""A model's buffers in the consensus model: averaged, the first rank's, or a rank's own.

DDP would broadcast the first rank's buffers at every forward. Here a buffer is a rank's own while
training. In the consensus model

- statistics that make sense as a mean are averaged: the running mean and variance of normalisation
  layers, and what the user names;
- every other buffer is the first rank's, as DDP would have it;
- what cannot be sent stays a rank's own: sparse tensors, tensors that repeat their memory
  (``expand``), and caches (buffers that are not saved) of another shape on every rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol

import torch
from torch import Tensor, nn

from commhooks.engine.vectors.bits import numbers
from commhooks.engine.vectors.devices import accumulation_dtype
from commhooks.errors import RegistrationError

__all__ = [
    "Buffer",
    "Described",
    "Exchange",
    "Replaced",
    "can_be_sent",
    "check_patterns",
    "common",
    "digest",
    "find_buffers",
    "write",
]

_STATISTICS = ("running_mean", "running_var")

Description = Mapping[str, tuple[object, ...]]
"""What ranks must have in common of every buffer, by name."""


class Described(Protocol):
    """What ranks compare by name before anything of it is sent."""

    @property
    def name(self) -> str:
        """What it is matched by."""

    def describe(self) -> tuple[object, ...]:
        """What ranks must have in common of it."""


class Replaced(Protocol):
    """What the consensus replaces, and puts back."""

    @property
    def tensor(self) -> Tensor:
        """The numbers."""

    @property
    def averaged(self) -> bool:
        """Whether the consensus has their mean, or the first rank's."""

    @property
    def compared(self) -> bool:
        """Whether the first rank's are sent along with the mean, and kept where they equal it."""

    def put_back(self, own: Tensor) -> None:
        """Give it this rank's own numbers again."""


@dataclass(frozen=True)
class Buffer:
    """One buffer of a model.

    Attributes:
        name: as in ``module.named_buffers()``.
        owner: the sub-module that it is registered in.
        tensor: the buffer itself.
        averaged: whether the consensus has its mean, or the first rank's.
    """

    name: str
    owner: nn.Module
    tensor: Tensor
    averaged: bool

    compared = True

    @property
    def key(self) -> str:
        """Its name within its owner."""
        return self.name.rpartition(".")[2]

    @property
    def saved(self) -> bool:
        """Whether it is part of the model's ``state_dict``; what is not can be made anew."""
        return self.key not in self.owner._non_persistent_buffers_set

    def describe(self) -> tuple[object, ...]:
        """What ranks must have in common of it."""
        return tuple(self.tensor.shape), str(self.tensor.dtype), self.saved, self.averaged

    def put_back(self, own: Tensor) -> None:
        """Give it this rank's own numbers again.

        A forward may have replaced a buffer by another tensor meanwhile. If that one is a cache,
        it fits what the module remembers of it, and stays.
        """
        write(self.tensor, own)
        if self.saved:
            self.owner._buffers[self.key] = self.tensor


def find_buffers(
    model: nn.Module, ignored: Container[str] = (), patterns: Sequence[str] = ()
) -> list[Buffer]:
    """The buffers that can be sent, by name, since ranks may have registered them in any order.

    Args:
        model: the model.
        ignored: names of those that stay a rank's own.
        patterns: names, or shell patterns of names, of further buffers to average.
    """
    found: dict[str, Buffer] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for key, tensor in module._buffers.items():
            name = f"{prefix}.{key}" if prefix else key
            if tensor is None or id(tensor) in seen or name in ignored:
                continue
            seen.add(id(tensor))
            if can_be_sent(tensor):
                averaged = _is_statistic(module, key) or _matches(name, patterns)
                found[name] = Buffer(name, module, tensor, averaged)
    return [found[name] for name in sorted(found)]


def check_patterns(model: nn.Module, patterns: Sequence[str]) -> None:
    """Check that every pattern names buffers that can be averaged.

    Raises:
        RegistrationError: one names none, or one that is no number or cannot be sent.
    """
    buffers = dict(model.named_buffers())
    for pattern in patterns:
        named = [name for name in buffers if fnmatchcase(name, pattern)]
        if not named:
            raise RegistrationError(
                f"average_buffers names {pattern!r}, which is no buffer of the model; it has "
                f"{sorted(buffers) or 'none'}."
            )
        for name in named:
            tensor = buffers[name]
            if not (tensor.is_floating_point() or tensor.is_complex()) or not can_be_sent(tensor):
                raise RegistrationError(
                    f"average_buffers names {name!r}, a {tensor.layout} tensor of {tensor.dtype} "
                    "that has no mean or repeats its memory; leave it out."
                )


def digest(held: Iterable[Described], bits: int | None) -> int:
    """A number below 2^48 that ranks with the same buffers and the same ``bits`` have in common.

    Args:
        held: buffers, or whatever, that are described.
        bits: a number that stands for the parameters.
    """
    text = repr(([(each.name, each.describe()) for each in held], bits))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def common(everyone: Sequence[Description], ranks: Sequence[int]) -> tuple[set[str], list[str]]:
    """Which buffers take part where the ranks describe different ones.

    Args:
        everyone: every rank's buffers.
        ranks: the ranks' numbers.

    Returns:
        The names of those that are alike on all ranks, and a sentence for every difference that
        cannot be passed over. Caches are passed over.
    """
    alike: set[str] = set()
    problems = []
    for name in sorted(set().union(*everyone)):
        found = [each.get(name) for each in everyone]
        if all(each == found[0] for each in found):
            alike.add(name)
        elif any(each is not None and each[2] for each in found):
            shown = ", ".join(
                f"{'missing' if each is None else each[:2]} on rank {rank}"
                for rank, each in zip(ranks, found, strict=True)
            )
            problems.append(f"buffer {name!r} is {shown}")
    return alike, problems


class Exchange:
    """What is sent of buffers and the like, and how they are replaced and put back.

    Args:
        held: those that take part, alike on all ranks.
        device: where the ranks' collectives run.
        workers: number of ranks.

    Attributes:
        first: numbers as bytes, to be overwritten with the first rank's.
        sums: what is to be summed over the ranks, by format.
    """

    def __init__(self, held: Sequence[Replaced], device: torch.device, workers: int) -> None:
        self._held = list(held)
        self._workers = workers
        self._own = [each.tensor.detach().clone() for each in held]
        self.first = _joined(
            [numbers(e.tensor).view(torch.uint8) for e in held if e.compared or not e.averaged],
            device,
        )
        parts: dict[torch.dtype, list[Tensor]] = {}
        for each in held:
            if each.averaged:
                dtype = accumulation_dtype(each.tensor.dtype)
                parts.setdefault(dtype, []).append(numbers(each.tensor).to(dtype))
        self.sums = {
            dtype: _joined(each, device).mul_(1.0 / workers) for dtype, each in parts.items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes that are sent."""
        return sum(flat.numel() * flat.element_size() for flat in (self.first, *self.sums.values()))

    def replace(self) -> None:
        """Put what has arrived in place."""
        begin = 0
        done = dict.fromkeys(self.sums, 0)
        for each in self._held:
            like = numbers(each.tensor)
            first: Tensor | None = None
            if each.compared or not each.averaged:
                size = like.numel() * like.element_size()
                # A copy, whose memory is aligned for any format.
                first = self.first[begin : begin + size].clone().view(like.dtype)
                begin += size
            value = first
            if each.averaged:
                dtype = accumulation_dtype(each.tensor.dtype)
                value = self.sums[dtype][done[dtype] : done[dtype] + like.numel()]
                done[dtype] += like.numel()
                if first is not None:
                    value = _rounded(value, first.to(dtype), self._workers)
                value = value.to(like.dtype)
            assert value is not None
            write(each.tensor, _shaped(value, each.tensor))

    def put_back(self) -> None:
        """Put this rank's own numbers back, bit for bit."""
        for each, own in zip(self._held, self._own, strict=True):
            each.put_back(own)


def _is_statistic(module: nn.Module, key: str) -> bool:
    both = [module._buffers.get(name) for name in _STATISTICS]
    return key in _STATISTICS and all(
        each is not None and each.is_floating_point() for each in both
    )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def can_be_sent(tensor: Tensor) -> bool:
    """Whether its numbers are all there, each in a place of its own."""
    return (
        tensor.layout == torch.strided
        and not tensor.is_quantized
        and tensor.device.type != "meta"
        and all(stride or size <= 1 for size, stride in zip(tensor.shape, tensor.stride()))  # noqa: B905 - as many
    )


def _shaped(flat: Tensor, like: Tensor) -> Tensor:
    if like.is_complex():
        return torch.view_as_complex(flat.view(*like.shape, 2))
    return flat.view(like.shape)


def _joined(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    if not parts:
        return torch.empty(0, dtype=torch.uint8, device=device)
    return torch.cat([part.to(device) for part in parts])


def _rounded(mean: Tensor, first: Tensor, workers: int) -> Tensor:
    """The mean, but the first rank's number where they differ by no more than a sum rounds off.

    A constant that is the same on all ranks then stays what it is.
    """
    slack = workers * torch.finfo(mean.dtype).eps * first.abs()
    return torch.where((mean - first).abs() <= slack, first, mean)


def write(tensor: Tensor, value: Tensor) -> None:
    """Copy ``value`` into a tensor, outside autograd."""
    # A cache that was made in inference mode can be written to there only.
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(value)
