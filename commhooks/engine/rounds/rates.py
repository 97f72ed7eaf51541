"""The learning rates of a fragment's parameters, as all workers know them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["agreed_rates", "plain_rates", "rate_changes", "rates_tensor", "told_rates"]


def rates_tensor(rates: Sequence[float | None], device: torch.device) -> Tensor:
    """In fp64, with NaN for one that is not known."""
    known = [math.nan if rate is None else rate for rate in rates]
    return torch.tensor(known, dtype=torch.float64, device=device)


def plain_rates(rates: Tensor) -> list[float | None]:
    """What :func:`rates_tensor` was made from."""
    return [None if math.isnan(rate) else rate for rate in rates.tolist()]


def told_rates(
    mine: Sequence[float | None], worker: int, workers: int, device: torch.device
) -> Tensor:
    """One row a parameter, this worker's rate in its column, so that the sum is everybody's."""
    told = torch.zeros(len(mine), workers, dtype=torch.float64, device=device)
    told[:, worker] = rates_tensor(mine, device)
    return told


def agreed_rates(told: Tensor) -> Tensor:
    """The mean over the workers, one a parameter; NaN if one of them does not know its own."""
    smallest, largest = told.aminmax(dim=1)
    # The mean of equal numbers may be another one in its last bit.
    return torch.where(smallest == largest, largest, told.mean(dim=1))


def rate_changes(now: Tensor, before: Tensor | None) -> Tensor:
    """The one divided by the other; 1 where either is 0 or not known."""
    if before is None:
        return torch.ones_like(now)
    change = now / before
    return torch.where(change.isfinite() & (change > 0), change, 1.0)
