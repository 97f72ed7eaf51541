"""Pins every step of DiLoCo to the reference, for all its choices, on two to four ranks."""

import random
from collections.abc import Iterator

import pytest
import torch

from tests.cases import Case
from tests.diloco.family import HEAVY_BALL, MERGES, NESTEROV, OUTERS, PLAIN, deep_model
from tests.expected import assert_ranks_follow
from tests.harness import run_ranks
from tests.training import Form, trajectories
from tests.workload import adamw, nesterov_sgd


def times() -> Iterator[dict[str, int]]:
    """Every tau with every delay that matters, and every number of fragments."""
    for tau in (1, 3, 8):
        for delay in sorted({0, 1, tau - 1, tau}):
            for fragments in (1, 2, 5):
                yield {"tau": tau, "delay": delay, "fragments": fragments}


def cases(dtype: torch.dtype, seed: int) -> list[Case]:
    """All of these, each past its third landing; what else there is to choose is drawn."""
    chance = random.Random(seed)
    outers = OUTERS if dtype == torch.float64 else (PLAIN, HEAVY_BALL, NESTEROV)
    drawn = []
    for arguments in times():
        warmup_steps = chance.choice([0, 2])
        drawn.append(
            Case(
                "DiLoCo",
                {**arguments, "outer": chance.choice(outers), **chance.choice(MERGES)},
                warmup_steps,
                chance.choice([nesterov_sgd, adamw]),
                dtype,
                warmup_steps + 3 * arguments["tau"] + arguments["delay"] + 1,
                deep_model,
            )
        )
    return drawn


@pytest.mark.parametrize(
    ("size", "dtype", "form"),
    [
        (2, torch.float64, "register"),
        (3, torch.float64, "hook"),
        (4, torch.float64, "register"),
        (2, torch.float32, "hook"),
    ],
)
def test_every_step_follows_the_equations(size: int, dtype: torch.dtype, form: Form) -> None:
    todo = cases(dtype, size)
    assert_ranks_follow(todo, run_ranks(trajectories, size, todo, form))


def test_every_outer_optimizer_with_every_merge() -> None:
    """What the draw above may have left out, with two fragments in flight."""
    todo = [
        Case(
            "DiLoCo",
            {"tau": 3, "fragments": 2, "delay": delay, "outer": outer, **merge},
            dtype=torch.float64,
            model=deep_model,
        )
        for outer in OUTERS
        for merge in MERGES
        for delay in (0, 2)
    ]
    assert_ranks_follow(todo, run_ranks(trajectories, 2, todo))
