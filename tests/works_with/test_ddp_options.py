"""Pins DDP's own options: bucket views, static graphs, unused parameters."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.cases import Case, two_cases
from tests.expected import assert_ranks_follow
from tests.harness import run_ranks
from tests.training import Form, Trainer, trajectories
from tests.workload import InItsOwnDtype, batch, initialise, plain_sgd


@pytest.mark.parametrize("form", ["register", "hook"])
@pytest.mark.parametrize(
    "options",
    [
        {"gradient_as_bucket_view": True},
        {"static_graph": True},
        {"static_graph": True, "gradient_as_bucket_view": True},
        {"bucket_cap_mb": 25},
    ],
    ids=str,
)
def test_options(options: Mapping[str, Any], form: Form) -> None:
    cases = [
        case
        for warmup_steps in (0, 2)
        for case in two_cases(warmup_steps=warmup_steps, ddp=options)
    ]
    assert_ranks_follow(cases, run_ranks(trajectories, 2, cases, form))


# Parameters of several formats, which DDP puts into buckets of their own.


def of_two_dtypes(dtype: torch.dtype) -> nn.Module:
    return initialise(InItsOwnDtype(nn.Linear(5, 4).double(), nn.Linear(4, 3), nn.Linear(3, 3)))


def complex_model(dtype: torch.dtype) -> nn.Module:
    """Complex weights between real ones, in both precisions."""
    layers = (
        nn.Linear(5, 4),
        nn.Linear(4, 4, dtype=torch.complex64),
        nn.Linear(4, 3, bias=False, dtype=torch.complex128),
    )
    return initialise(InItsOwnDtype(*layers))


def magnitudes(model: nn.Module, rank: int, step: int) -> None:
    """Mean squared error of the outputs' magnitudes."""
    x, y = batch(rank, step)
    torch.autograd.backward(nn.functional.mse_loss(model(x).abs().float(), y))


@pytest.mark.parametrize("form", ["register", "hook"])
@pytest.mark.parametrize("options", [{}, {"static_graph": True}], ids=str)
def test_several_dtypes(options: Mapping[str, Any], form: Form) -> None:
    """A static graph's first backward calls the hook bucket by bucket in an order of its own."""
    settings: list[dict[str, Any]] = [
        {"model": of_two_dtypes},
        {"model": complex_model, "backward": magnitudes},
    ]
    cases = [
        case
        for each in settings
        for warmup_steps in (0, 2)
        for case in [
            *two_cases(**each, warmup_steps=warmup_steps, optimizers=plain_sgd, ddp=options),
            Case("AllReduce", optimizers=plain_sgd, ddp=options, **each),
        ]
    ]
    assert_ranks_follow(cases, run_ranks(trajectories, 2, cases, form))


def resumed_in_warm_up(cases: Sequence[Case], form: Form) -> None:
    """In buckets of DDP's that a checkpoint asks for, complex numbers counted as two."""
    for case in cases:
        trainer = Trainer(case, form)
        for step in range(1, case.steps):
            trainer.step()
            again = Trainer(case, form)
            again.steps = step
            again.model.load_state_dict(trainer.model.state_dict())
            again.state.load_state_dict(trainer.state.state_dict())
            twin = Trainer(case, form)
            for _ in range(step + 1):
                twin.step()
            assert torch.equal(again.step(), twin.x), (str(case), step)


@pytest.mark.parametrize("form", ["register", "hook"])
def test_complex_parameters_resumed_in_warm_up(form: Form) -> None:
    cases = [
        Case(
            "OverlapLocalSGD",
            {"tau": 2},
            warmup_steps=3,
            optimizers=plain_sgd,
            model=complex_model,
            backward=magnitudes,
            steps=5,
            ddp=options,
        )
        for options in ({}, {"static_graph": True})
    ]
    run_ranks(resumed_in_warm_up, 2, cases, form)


class TwoBranches(nn.Module):
    """``branch`` says which of two layers is used; the other gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 5)
        self.branches = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)])

    def forward(self, x: Tensor, branch: int) -> Tensor:
        y: Tensor = self.branches[branch](torch.tanh(self.stem(x)))
        return y


def two_branches(dtype: torch.dtype) -> nn.Module:
    return initialise(TwoBranches()).to(dtype)


def alternating(model: nn.Module, rank: int, step: int) -> None:
    """Every rank uses the same branch, another one at every step."""
    _through(model, rank, step, branch=step % 2)


def differing(model: nn.Module, rank: int, step: int) -> None:
    """The ranks use different branches."""
    _through(model, rank, step, branch=(rank + step) % 2)


def _through(model: nn.Module, rank: int, step: int, branch: int) -> None:
    x, y = batch(rank, step)
    torch.autograd.backward(nn.functional.mse_loss(model(x, branch), y))


@pytest.mark.parametrize("form", ["register", "hook"])
def test_find_unused_parameters(form: Form) -> None:
    options = {"find_unused_parameters": True}
    cases = [
        *two_cases(model=two_branches, backward=alternating, ddp=options),
        *two_cases(model=two_branches, backward=differing, ddp=options, optimizers=plain_sgd),
        Case(
            "CoCoDSGD",
            {"tau": 2},
            warmup_steps=3,
            model=two_branches,
            backward=alternating,
            ddp=options,
        ),
    ]
    assert_ranks_follow(cases, run_ranks(trajectories, 2, cases, form))


def two_forwards(model: nn.Module, rank: int, step: int) -> None:
    """Two forwards and one backward a step: still one step."""
    x, y = batch(rank, step)
    first, second = model(x), model(x + 1)
    torch.autograd.backward(nn.functional.mse_loss(first + second, y))


def test_two_forwards_before_one_backward() -> None:
    cases = two_cases(backward=two_forwards, ddp={"static_graph": True})
    assert_ranks_follow(cases, run_ranks(trajectories, 2, cases))
