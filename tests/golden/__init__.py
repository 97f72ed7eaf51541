"""Trajectories of one weight on two workers, small enough to check by hand."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from tests.cases import Case


@dataclass(frozen=True)
class Golden:
    case: Case
    ranks: Sequence[Sequence[float]]

    def __str__(self) -> str:
        return str(self.case)


def load() -> list[Golden]:
    data: dict[str, Any] = json.loads((Path(__file__).parent / "two_workers.json").read_text())
    return [
        Golden(
            Case(
                run["algorithm"],
                run["arguments"],
                run["warmup_steps"],
                unit_sgd,
                torch.float64,
                steps=len(run["rank 0"]),
                model=weight,
                backward=made_up_gradient,
            ),
            [run["rank 0"], run["rank 1"]],
        )
        for run in data["runs"]
    ]


def weight(dtype: torch.dtype) -> nn.Module:
    model = nn.Linear(1, 1, bias=False, dtype=dtype)
    nn.init.zeros_(model.weight)
    return model


def unit_sgd(model: nn.Module) -> Sequence[Optimizer]:
    return [SGD(model.parameters(), lr=1.0)]


def made_up_gradient(model: nn.Module, rank: int, step: int) -> None:
    """Backward of a loss whose gradient is -1 on rank 0 and -3 on rank 1."""
    (model(torch.ones(1, 1, dtype=torch.float64)) * [-1.0, -3.0][rank]).sum().backward()
