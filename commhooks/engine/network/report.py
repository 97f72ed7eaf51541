"""What a rank tells the others with a round: how far it has moved, and how fast it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

__all__ = ["COLUMNS", "NAMES", "RATES", "Report"]

RATES = 4
"""How many learning rates are told, the largest ones."""


@dataclass
class Report:
    """One rank's figures; those of its device may be scalar tensors.

    Norms are of every k-th number (:mod:`commhooks.engine.rounds.drift`), in units that make all
    fragments add up.

    Attributes:
        apart: ||x - z||^2, of this rank's parameters before the launch and what all workers share.
        length: ||z||^2.
        moved: ||c - z||^2, of what this rank contributes.
        together: ||mean c - z||^2 of the same round, on a rank that has a share of an island's
            model; it is known a round later, and so is ``moved`` there.
        step_seconds: time of a step without waiting; 0 if not known.
        round_seconds: time that the last round was in flight; 0 if not known.
        seconds_exposed, seconds_hidden: as in :class:`commhooks.Stats`.
        loss: sum of the losses that the user told since the last launch.
        losses: how many.
        rates: the largest learning rates in force.
    """

    apart: float | Tensor = 0.0
    length: float | Tensor = 0.0
    moved: float | Tensor = 0.0
    together: float | Tensor = 0.0
    step_seconds: float = 0.0
    round_seconds: float = 0.0
    seconds_exposed: float = 0.0
    seconds_hidden: float = 0.0
    loss: float | Tensor = 0.0
    losses: float = 0.0
    rates: Sequence[float] = ()

    def row(self, device: torch.device) -> Tensor:
        """As numbers in fp64."""
        values = [getattr(self, name) for name in NAMES]
        rates = sorted({*self.rates}, reverse=True)[:RATES]
        values += [*rates, *[0.0] * (RATES - len(rates))]
        known = [0.0 if isinstance(value, Tensor) else value for value in values]
        row = torch.tensor(known, dtype=torch.float64).to(device)
        for number, value in enumerate(values):
            if isinstance(value, Tensor):
                row[number] = value
        return row


NAMES = tuple(field.name for field in fields(Report) if field.name != "rates")
"""Of the numbers that come before the rates."""

COLUMNS = len(NAMES) + RATES
"""How many numbers a report is."""
