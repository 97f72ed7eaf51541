"""Pins every step of compressed rounds to the reference: what is rounded, what is sent later."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from tests.cases import PERIODIC, Case, of_every_algorithm
from tests.diloco.family import ADAMW, NESTEROV, Outer, of_tau_four
from tests.expected import assert_ranks_follow
from tests.harness import run_ranks
from tests.sharded.training import TIDY, sharded_trajectories
from tests.training import trajectories
from tests.workload import initialise


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


def cases(kind: str, **settings: Any) -> list[Case]:
    """Every algorithm that averages parameters, in one bucket, which the reference has too."""
    settings = {"dtype": torch.float64, "model": wide_model, "cap_mb": 25.0, **settings}
    return list(of_every_algorithm(((1, 2), (3, 0)), PERIODIC, compression=kind, **settings))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_step_follows_the_equations(size: int) -> None:
    todo = [case for kind in KINDS for case in cases(kind)]
    assert_ranks_follow(todo, run_ranks(trajectories, size, todo))


def test_several_fragments_in_flight() -> None:
    """Second shots of one fragment and first ones of another are under way at once."""
    chosen: list[tuple[Outer, dict[str, Any]]] = [
        (NESTEROV, {}),
        (ADAMW, {"alpha": 0.4}),
        (partial(SGD, lr=1.0), {"merge": "carry"}),
    ]
    todo = [
        case
        for kind in KINDS
        for case in of_tau_four(
            chosen,
            ((2, 3), (4, 4), (3, 0), (4, 1)),
            model=wide_model,
            compression=kind,
            cap_mb=25.0,
        )
    ]
    assert_ranks_follow(todo, run_ranks(trajectories, 4, todo))


def test_between_islands() -> None:
    """Each share is cut into blocks of its own; of this model they are the reference's blocks."""
    todo = cases("int8", island=2, model=even_model)
    assert_ranks_follow(todo, run_ranks(trajectories, 4, todo))


def even_model(dtype: torch.dtype) -> nn.Module:
    """4,608 numbers: two shares of nine whole blocks."""
    model = nn.Sequential(nn.Linear(5, 512), nn.Tanh(), nn.Linear(512, 3, bias=False))
    return _small(model).to(dtype)


def test_between_sharded_models() -> None:
    """bf16 has no blocks, and rounds the same however the model is cut into shards."""
    todo = cases("bf16", island=2)
    assert_ranks_follow(todo, run_ranks(sharded_trajectories, 4, todo, tidy=TIDY))
