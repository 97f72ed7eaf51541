"""Pins every step of FSDP2 models to the reference, in which an island is one worker."""

import itertools
from collections.abc import Iterator

import pytest
import torch

from tests.cases import ALGORITHMS, Case, with_tau
from tests.diloco.family import ADAMW, MERGES, NESTEROV, deep_model
from tests.expected import assert_ranks_follow
from tests.harness import run_ranks
from tests.sharded.training import TIDY, sharded_trajectories
from tests.workload import adamw, nesterov_sgd


def cases(island: int, dtype: torch.dtype = torch.float64) -> Iterator[Case]:
    """Every algorithm, with and without warm-up, each past its third boundary."""
    for algorithm, (tau, warmup_steps) in itertools.product(ALGORITHMS, ((1, 2), (3, 0))):
        for arguments in with_tau(algorithm, tau):
            yield Case(
                algorithm,
                arguments,
                warmup_steps,
                adamw if warmup_steps else nesterov_sgd,
                dtype,
                warmup_steps + 3 * tau + 2,
                deep_model,
                island=island,
            )


@pytest.mark.parametrize(("size", "island"), [(4, 2), (6, 3), (2, 1)])
def test_every_step_follows_the_equations(size: int, island: int) -> None:
    """The layers' sizes, 6, 7 and 3, are shared out unevenly, or not at all."""
    todo = list(cases(island))
    assert_ranks_follow(todo, run_ranks(sharded_trajectories, size, todo, tidy=TIDY))


def test_streaming_with_outer_optimizers() -> None:
    todo = [
        Case(
            "DiLoCo",
            {"tau": 4, "fragments": fragments, "delay": delay, "outer": outer, **merge},
            dtype=torch.float64,
            model=deep_model,
            steps=14,
            island=2,
        )
        for outer in (NESTEROV, ADAMW)
        for merge in MERGES
        for fragments, delay in ((2, 3), (5, 1))
    ]
    assert_ranks_follow(todo, run_ranks(sharded_trajectories, 4, todo, tidy=TIDY))
