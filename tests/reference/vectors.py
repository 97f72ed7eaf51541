"""Whole-model vectors: a model's parameters in one tensor, and the mean over workers."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def flat(parameters: Iterable[Tensor]) -> Tensor:
    """A copy of the parameters as one vector."""
    return torch.cat([p.detach().reshape(-1) for p in parameters])


@torch.no_grad()
def write(vector: Tensor, parameters: Iterable[Tensor]) -> None:
    """Copy the parts of ``vector`` into the parameters; it is complex if one of them is."""
    offset = 0
    for p in parameters:
        part = vector[offset : offset + p.numel()].view_as(p)
        p.copy_(part.real if part.is_complex() and not p.is_complex() else part)
        offset += p.numel()


Mean = Callable[[Sequence[Tensor]], Tensor]
"""Takes one vector a worker."""


def mean(vectors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(vectors)).mean(dim=0)
