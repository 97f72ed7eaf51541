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

import torch
from torch import Tensor, nn

from commhooks.engine.vectors.chunks import real
from commhooks.engine.vectors.devices import accumulation_dtype
from commhooks.errors import RegistrationError

__all__ = ["Buffer", "BufferExchange", "check_patterns", "common", "digest", "find_buffers"]

_STATISTICS = ("running_mean", "running_var")

Description = Mapping[str, tuple[object, ...]]
"""What ranks must have in common of every buffer, by name."""


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
            if _can_be_sent(tensor):
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
            if not (tensor.is_floating_point() or tensor.is_complex()) or not _can_be_sent(tensor):
                raise RegistrationError(
                    f"average_buffers names {name!r}, a {tensor.layout} tensor of {tensor.dtype} "
                    "that has no mean or repeats its memory; leave it out."
                )


def digest(buffers: Iterable[Buffer], bits: int | None) -> int:
    """A number below 2^48 that ranks with the same buffers and the same ``bits`` have in common.

    Args:
        buffers: what is described.
        bits: a number that stands for the parameters.
    """
    text = repr(([(buffer.name, buffer.describe()) for buffer in buffers], bits))
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


class BufferExchange:
    """What is sent of the buffers, and how they are replaced and put back.

    Args:
        buffers: those that take part, alike on all ranks.
        device: where the ranks' collectives run.

    Attributes:
        first: all numbers as bytes, to be overwritten with the first rank's.
        sums: what is to be summed over the ranks, by format.
    """

    def __init__(self, buffers: Sequence[Buffer], device: torch.device, workers: int) -> None:
        self._buffers = list(buffers)
        self._workers = workers
        self._own = [buffer.tensor.detach().clone() for buffer in buffers]
        self.first = _joined([_flat(b.tensor).view(torch.uint8) for b in buffers], device)
        parts: dict[torch.dtype, list[Tensor]] = {}
        for buffer in buffers:
            if buffer.averaged:
                dtype = accumulation_dtype(buffer.tensor.dtype)
                parts.setdefault(dtype, []).append(_flat(buffer.tensor).to(dtype))
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
        for buffer in self._buffers:
            like = _flat(buffer.tensor)
            size = like.numel() * like.element_size()
            # A copy, whose memory is aligned for any format.
            value = self.first[begin : begin + size].clone().view(like.dtype)
            begin += size
            if buffer.averaged:
                dtype = accumulation_dtype(buffer.tensor.dtype)
                mean = self.sums[dtype][done[dtype] : done[dtype] + like.numel()]
                done[dtype] += like.numel()
                value = _rounded(mean, value.to(dtype), self._workers).to(like.dtype)
            _write(buffer.tensor, _shaped(value, buffer.tensor))

    def put_back(self) -> None:
        """Put this rank's own numbers back, bit for bit.

        A forward may have replaced a buffer by another tensor meanwhile. If that one is a cache,
        it fits what the module remembers of it, and stays.
        """
        for buffer, own in zip(self._buffers, self._own, strict=True):
            _write(buffer.tensor, own)
            if buffer.saved:
                buffer.owner._buffers[buffer.key] = buffer.tensor


def _is_statistic(module: nn.Module, key: str) -> bool:
    both = [module._buffers.get(name) for name in _STATISTICS]
    return key in _STATISTICS and all(
        each is not None and each.is_floating_point() for each in both
    )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _can_be_sent(tensor: Tensor) -> bool:
    return (
        tensor.layout == torch.strided
        and not tensor.is_quantized
        and tensor.device.type != "meta"
        and all(stride or size <= 1 for size, stride in zip(tensor.shape, tensor.stride()))  # noqa: B905 - as many
    )


def _flat(tensor: Tensor) -> Tensor:
    """The numbers of a buffer as real ones, in the order of its indices."""
    return real(tensor.detach().resolve_conj().resolve_neg()).reshape(-1)


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


def _write(tensor: Tensor, value: Tensor) -> None:
    # A cache that was made in inference mode can be written to there only.
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(value)
