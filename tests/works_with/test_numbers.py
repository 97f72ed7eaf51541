"""Pins numbers that are finite and large: their squares and their sums are not."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from tests.cases import ALGORITHMS, Case, with_tau
from tests.expected import reference_workers
from tests.harness import run_ranks
from tests.training import Trainer
from tests.workload import ragged_model


def zeros(dtype: torch.dtype) -> nn.Module:
    model = ragged_model(dtype)
    for p in model.parameters():
        nn.init.zeros_(p)
    return model


def unit_sgd(model: nn.Module) -> Sequence[Optimizer]:
    return [SGD(model.parameters(), lr=1.0)]


def apart(model: nn.Module, rank: int, step: int) -> None:
    """The first step takes one rank to 1e20 and the next to -1e20; later ones move nothing."""
    move_to(model, (-1.0) ** rank * 1e20 if step == 1 else 0.0)


def together(model: nn.Module, rank: int, step: int) -> None:
    """All ranks to 2e38, of which no two can be added."""
    move_to(model, 2e38 if step == 1 else 0.0)


def move_to(model: nn.Module, value: float) -> None:
    """A gradient of ``-value`` in every parameter."""
    x = torch.zeros(1, 5, dtype=next(model.parameters()).dtype)
    total = model(x).sum() * 0
    for p in model.parameters():
        # Its value does not matter and overflows, only its gradient does.
        total = total + (p * torch.full_like(p, -value)).sum()
    torch.autograd.backward(total)


WITHOUT_MOMENTUM = ("LocalSGD", "OverlapLocalSGD", "EASGD", "CoCoDSGD")
"""Algorithms that stay where all ranks are: a momentum would rightly carry them beyond fp32."""


class End(NamedTuple):
    steps: list[Tensor]
    consensus: Tensor
    distance: float


def ends(cases: Sequence[Case]) -> list[End]:
    found = []
    for case in cases:
        trainer = Trainer(case)
        steps = [trainer.step() for _ in range(case.steps)]
        with trainer.state.averaged():
            consensus = trainer.x
        found.append(End(steps, consensus, trainer.state.stats.consensus_distance))
    return found


def cases_of(backward: str) -> list[Case]:
    return [
        Case(
            name,
            arguments,
            optimizers=unit_sgd,
            model=zeros,
            backward={"apart": apart, "together": together}[backward],
            steps=5,
        )
        for name in ALGORITHMS
        for arguments in with_tau(name, 1)
        if backward == "apart" or (name in WITHOUT_MOMENTUM and not arguments.get("beta"))
    ]


@pytest.mark.parametrize("backward", ["apart", "together"])
def test_large_finite_parameters_are_averaged(backward: str) -> None:
    """They were taken for NaN or inf by the square of their distance, or became inf in a sum."""
    cases = cases_of(backward)
    for case, *real in zip(cases, *run_ranks(ends, 2, cases), strict=True):
        workers = reference_workers(replace(case, dtype=torch.float64), 2)
        for step in range(case.steps):
            for rank, x in enumerate(workers.step(case.backward)):
                assert_near(case, real[rank].steps[step], x)
        for end in real:
            assert_near(case, end.consensus, workers.consensus)
            assert math.isfinite(end.distance), case


def assert_near(case: Case, real: Tensor, expected: Tensor) -> None:
    scale = 2e38 if case.backward is together else 1e20
    off = (real.double() - expected).abs().max().item()
    assert off <= 1e-5 * scale, (str(case), off)
