"""Pins that a step is a synchronised backward: micro-batches under no_sync() are none."""

import pytest
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.cases import two_cases
from tests.expected import assert_ranks_follow
from tests.harness import run_ranks
from tests.training import Form, trajectories
from tests.workload import gradient

MICRO_BATCHES = 3


def accumulated(model: nn.Module, rank: int, step: int) -> None:
    """Three micro-batches a step; a DDP model synchronises in the last alone."""
    first = (step - 1) * MICRO_BATCHES
    for micro in range(first, first + MICRO_BATCHES - 1):
        if isinstance(model, DistributedDataParallel):
            with model.no_sync():
                gradient(model, rank, micro)
        else:
            gradient(model, rank, micro)
    gradient(model, rank, first + MICRO_BATCHES - 1)


@pytest.mark.parametrize("form", ["register", "hook"])
@pytest.mark.parametrize("as_view", [False, True])
def test_gradient_accumulation(form: Form, as_view: bool) -> None:
    cases = [
        case
        for warmup_steps in (0, 2)
        for case in two_cases(
            warmup_steps=warmup_steps,
            backward=accumulated,
            ddp={"gradient_as_bucket_view": as_view},
        )
    ]
    assert_ranks_follow(cases, run_ranks(trajectories, 2, cases, form))
