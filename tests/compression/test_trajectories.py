"""Pins every step of compressed rounds to the reference: what is rounded, what is sent later."""

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from tests.cases import PERIODIC, Case, with_tau
from tests.diloco.family import ADAMW, NESTEROV
from tests.expected import assert_ranks_follow
from tests.harness import run_ranks
from tests.sharded.training import TIDY, sharded_trajectories
from tests.training import trajectories
from tests.workload import adamw, initialise, nesterov_sgd


def _small(model: nn.Module) -> nn.Module:
    """So many numbers would make the steps of the other tests explode."""
    initialise(model)
    with torch.no_grad():
        for p in model.parameters():
            p.div_(10)
    return model


KINDS = ("bf16", "int8", "int4")


def wide_model(dtype: torch.dtype) -> nn.Module:
    """1,383 numbers: six blocks, the last one not full, and pieces that nothing divides."""
    model = nn.Sequential(nn.Linear(5, 153), nn.Tanh(), nn.Linear(153, 3))
    return _small(model).to(dtype)


def cases(kind: str, **settings: Any) -> Iterator[Case]:
    """Every algorithm, each past its third landing, in one bucket."""
    both: dict[str, Any] = {"dtype": torch.float64, "model": wide_model, "cap_mb": 25.0}
    both |= settings
    for algorithm, (tau, warmup_steps) in itertools.product(PERIODIC, ((1, 2), (3, 0))):
        for arguments in with_tau(algorithm, tau):
            yield Case(
                algorithm,
                arguments,
                warmup_steps,
                adamw if warmup_steps else nesterov_sgd,
                steps=warmup_steps + 3 * tau + 2,
                compression=kind,
                **both,
            )


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_step_follows_the_equations(size: int) -> None:
    todo = [case for kind in KINDS for case in cases(kind)]
    assert_ranks_follow(todo, run_ranks(trajectories, size, todo))


def test_several_fragments_in_flight() -> None:
    """Second shots of one fragment and first ones of another are under way at once."""
    outers = (NESTEROV, ADAMW, partial(SGD, lr=1.0))
    merges: tuple[dict[str, Any], ...] = ({}, {"alpha": 0.4}, {"merge": "carry"})
    todo = [
        Case(
            "DiLoCo",
            {"tau": 4, "fragments": fragments, "delay": delay, "outer": outer, **merge},
            dtype=torch.float64,
            model=wide_model,
            steps=14,
            compression=kind,
            cap_mb=25.0,
        )
        for kind in KINDS
        for outer, merge in zip(outers, merges, strict=True)
        for fragments, delay in ((2, 3), (4, 4), (3, 0), (4, 1))
        if (delay, merge) != (4, {})
    ]
    assert_ranks_follow(todo, run_ranks(trajectories, 4, todo))


def test_between_islands_of_one_rank_each_share() -> None:
    """A rank's share of the model is what its blocks are cut from: whole blocks here."""
    todo = list(cases("int8", island=2, model=even_model))
    assert_ranks_follow(todo, run_ranks(trajectories, 4, todo))


def even_model(dtype: torch.dtype) -> nn.Module:
    """4,608 numbers: two shares of nine blocks."""
    model = nn.Sequential(nn.Linear(5, 512), nn.Tanh(), nn.Linear(512, 3, bias=False))
    return _small(model).to(dtype)


def test_between_sharded_models() -> None:
    """With one number to a shard's block, rounding to bf16 is the same however they are cut."""
    todo = list(cases("bf16", island=2))
    assert_ranks_follow(todo, run_ranks(sharded_trajectories, 4, todo, tidy=TIDY))
