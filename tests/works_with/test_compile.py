"""Pins compiled models: DDP around a compiled module, and a compiled DDP.

The compiler may leave a thread behind.
"""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import commhooks
from tests.cases import Case, two_cases
from tests.expected import assert_follows, assert_ranks_follow, reference_workers
from tests.harness import run_ranks
from tests.reference import flat
from tests.training import Form, make_state, trajectories, wrapped
from tests.workload import ragged_model

DDP = {"bucket_cap_mb": 25}  # dynamo refuses a cap below the first bucket's own of 1 MB


def compiled_module(dtype: torch.dtype) -> nn.Module:
    module: nn.Module = torch.compile(ragged_model(dtype), backend="aot_eager")  # type: ignore[assignment]
    return module


@pytest.mark.parametrize("form", ["register", "hook"])
def test_ddp_of_a_compiled_module(form: Form) -> None:
    cases = two_cases(warmup_steps=1, model=compiled_module, ddp=DDP)
    ranks = run_ranks(trajectories, 2, cases, form, tidy=False)
    assert_ranks_follow(two_cases(warmup_steps=1), ranks)


def compiled_ddp_trajectories(cases: Sequence[Case], form: Form) -> list[list[Tensor]]:
    return [compiled_ddp_trajectory(case, form) for case in cases]


def compiled_ddp_trajectory(case: Case, form: Form) -> list[Tensor]:
    torch.compiler.reset()
    ddp = wrapped(case.model(case.dtype), **case.ddp)
    compiled: DistributedDataParallel = torch.compile(ddp, backend="aot_eager")  # type: ignore[assignment]
    (optimizer,) = case.optimizers(compiled)
    state = make_state(case)
    if form == "register":
        state.register(compiled, optimizer)
    else:
        compiled.register_comm_hook(state, commhooks.comm_hook)
    steps = []
    for step in range(1, case.steps + 1):
        case.backward(compiled, torch.distributed.get_rank(), step)
        optimizer.step()
        optimizer.zero_grad()
        steps.append(flat(ddp.parameters()))
    return steps


SKIPPED = {(1, 2), (1, 3)}
"""Rank 1 leaves out the optimizer's step at a boundary of tau=2 and at one of tau=3."""


def forgetful_trajectories(cases: Sequence[Case]) -> list[list[Tensor]]:
    """Each case's parameters after the forward that follows a step, in a compiled DDP."""
    return [forgetful_trajectory(case) for case in cases]


def forgetful_trajectory(case: Case) -> list[Tensor]:
    torch.compiler.reset()
    ddp = wrapped(case.model(case.dtype), **case.ddp)
    compiled: DistributedDataParallel = torch.compile(ddp, backend="aot_eager")  # type: ignore[assignment]
    (optimizer,) = case.optimizers(compiled)
    make_state(case).register(compiled, optimizer)
    steps = []
    for step in range(1, case.steps + 1):
        case.backward(compiled, torch.distributed.get_rank(), step)
        if (torch.distributed.get_rank(), step) not in SKIPPED:
            optimizer.step()
        optimizer.zero_grad()
        compiled(torch.zeros(4, 5))
        steps.append(flat(ddp.parameters()))
    return steps


def test_a_boundary_in_the_forward_of_a_compiled_ddp() -> None:
    cases = two_cases(ddp=DDP)
    ranks = run_ranks(forgetful_trajectories, 2, cases, tidy=False)
    for case, *real in zip(cases, *ranks, strict=True):
        workers = reference_workers(case, 2)
        assert_follows(
            case, real, [workers.step(case.backward, SKIPPED) for _ in range(case.steps)]
        )


@pytest.mark.parametrize("form", ["register", "hook"])
def test_a_compiled_ddp(form: Form) -> None:
    cases = two_cases(warmup_steps=1, ddp=DDP)
    assert_ranks_follow(cases, run_ranks(compiled_ddp_trajectories, 2, cases, form, tidy=False))
