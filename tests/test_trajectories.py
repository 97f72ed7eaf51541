"""Pins every step of every algorithm, phase offsets included, to the reference equations."""

import itertools

import pytest
import torch

from tests.cases import ALGORITHMS, Case, with_tau
from tests.expected import assert_ranks_follow
from tests.harness import run_ranks
from tests.training import trajectories
from tests.workload import adamw, nesterov_sgd


def cases(algorithm: str, dtype: torch.dtype) -> list[Case]:
    """Every tau, with and without warm-up, with two optimizers; each past its third boundary."""
    taus = [1, 2, 3, 5] if dtype == torch.float64 else [2, 5]
    if algorithm == "AllReduce":
        taus = [1]
    return [
        Case(algorithm, arguments, warmup_steps, optimizers, dtype, warmup_steps + 3 * tau + 2)
        for tau, warmup_steps, optimizers in itertools.product(taus, [0, 3], [nesterov_sgd, adamw])
        for arguments in with_tau(algorithm, tau)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_step_follows_the_equations(algorithm: str, size: int, dtype: torch.dtype) -> None:
    todo = cases(algorithm, dtype)
    assert_ranks_follow(todo, run_ranks(trajectories, size, todo))
