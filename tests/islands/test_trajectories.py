"""Pins every step of ranks in islands to the reference, in which an island is one worker."""

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from tests.cases import Case, of_every_algorithm
from tests.diloco.family import ADAFACTOR, ADAMW, MERGES, NESTEROV, deep_model, of_tau_four
from tests.expected import assert_ranks_follow
from tests.harness import run_ranks
from tests.training import trajectories
from tests.workload import InItsOwnDtype, adamw, initialise


def cases(island: int, dtype: torch.dtype = torch.float64) -> list[Case]:
    """Every algorithm, with and without warm-up."""
    times = itertools.product((1, 3), (0, 2))
    return list(of_every_algorithm(times, dtype=dtype, model=deep_model, island=island))


@pytest.mark.parametrize(("size", "island"), [(4, 2), (6, 2), (4, 4), (2, 1)])
def test_every_step_follows_the_equations(size: int, island: int) -> None:
    todo = cases(island)
    ranks = run_ranks(trajectories, size, todo)
    assert_ranks_follow(todo, ranks)
    _assert_islands_agree(ranks, island)


def test_single_precision_in_islands_of_three() -> None:
    todo = cases(3, torch.float32)
    ranks = run_ranks(trajectories, 6, todo)
    assert_ranks_follow(todo, ranks)
    _assert_islands_agree(ranks, 3)


def test_outer_optimizers_see_parameters_in_their_own_shape() -> None:
    """Adafactor factorises a matrix, which no rank may then have a part of."""
    outers, times = (NESTEROV, ADAMW, ADAFACTOR), ((1, 0), (2, 3), (5, 1))
    todo = of_tau_four(itertools.product(outers, MERGES), times, island=2)
    assert_ranks_follow(todo, run_ranks(trajectories, 4, todo))


def mixed_model(dtype: torch.dtype) -> nn.Module:
    """Parameters of two formats, one of a single number, one not dense in memory."""
    model = InItsOwnDtype(nn.Linear(5, 6), nn.Linear(6, 1), nn.Linear(1, 3))
    initialise(model)
    model[1].double()
    weight: Tensor = model[0].get_parameter("weight")
    weight.data = torch.empty(12, 5)[::2].copy_(weight.data)
    return model


def test_parameters_that_cannot_be_cut_evenly() -> None:
    outer = partial(SGD, lr=0.7, momentum=0.9)
    todo = [
        Case(algorithm, arguments, model=mixed_model, optimizers=adamw, island=2)
        for algorithm, arguments in (
            ("LocalSGD", {"tau": 2}),
            ("OverlapLocalSGD", {"tau": 3, "beta": 0.5}),
            ("CoCoDSGD", {"tau": 2}),
            ("DiLoCo", {"tau": 3, "fragments": 3, "delay": 2, "outer": outer}),
        )
    ]
    assert_ranks_follow(todo, run_ranks(trajectories, 4, todo))


def _assert_islands_agree(ranks: list[list[list[Tensor]]], island: int) -> None:
    """Bit for bit, after every step."""
    for first in range(0, len(ranks), island):
        for other in ranks[first : first + island]:
            for mine, theirs in zip(ranks[first], other, strict=True):
                assert all(torch.equal(x, y) for x, y in zip(mine, theirs, strict=True))
