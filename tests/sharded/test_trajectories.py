"""Pins every step of FSDP2 models to the reference, in which an island is one worker."""

import itertools

import pytest
import torch

from tests.cases import of_every_algorithm
from tests.diloco.family import ADAMW, MERGES, NESTEROV, deep_model, of_tau_four
from tests.expected import assert_ranks_follow
from tests.harness import run_ranks
from tests.sharded.training import TIDY, sharded_trajectories


@pytest.mark.parametrize(("size", "island"), [(4, 2), (6, 3), (2, 1)])
def test_every_step_follows_the_equations(size: int, island: int) -> None:
    """The layers' sizes, 6, 7 and 3, are shared out unevenly, or not at all."""
    todo = list(
        of_every_algorithm(((1, 2), (3, 0)), dtype=torch.float64, model=deep_model, island=island)
    )
    assert_ranks_follow(todo, run_ranks(sharded_trajectories, size, todo, tidy=TIDY))


def test_streaming_with_outer_optimizers() -> None:
    chosen = itertools.product((NESTEROV, ADAMW), MERGES)
    todo = of_tau_four(chosen, ((2, 3), (5, 1)), island=2)
    assert_ranks_follow(todo, run_ranks(sharded_trajectories, 4, todo, tidy=TIDY))
