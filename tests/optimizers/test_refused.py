"""Pins which optimizers are refused by name: those that would undo an average, or train a shard.

And that those which only look like one of them are not.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import ASGD, LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop, Rprop

import commhooks
from tests.cases import Case
from tests.expected import assert_ranks_follow
from tests.harness import run_ranks
from tests.optimizers.keeping_copies import (
    DAdaptSGD,
    FromAList,
    FromTheStart,
    LateMasters,
    MastersInAList,
    MastersInState,
    ScheduleFree,
    lookahead,
)
from tests.training import Form, Trainer, trajectories
from tests.workload import adamw, initialise, loss, ragged_model, trained

Make = Callable[[Any], Optimizer]


def zero(params: Any) -> Optimizer:
    return ZeroRedundancyOptimizer(params, AdamW, lr=0.01)


def refused(kinds: Sequence[tuple[Make, str, torch.dtype]], form: Form) -> None:
    """At registration, or after the first steps, where it can only be seen then."""
    for make, name, dtype in kinds:
        for algorithm in ("LocalSGD", "OverlapLocalSGD"):
            case = Case(
                algorithm,
                {"tau": 2},
                dtype=dtype,
                optimizers=lambda model, make=make: [make(trained(model))],  # type: ignore[misc]
            )
            with pytest.raises(commhooks.RegistrationError, match=name):
                train(case, form)
            dist.barrier()


def train(case: Case, form: Form) -> None:
    trainer = Trainer(case, form)
    for _ in range(6):
        trainer.step()
    trainer.state.finish()


KINDS: list[tuple[Make, str, torch.dtype]] = [
    (MastersInState, "MastersInState", torch.bfloat16),
    (MastersInState, "MastersInState", torch.float32),
    (MastersInAList, "MastersInAList", torch.bfloat16),
    (MastersInAList, "MastersInAList", torch.float16),
    (lookahead, "Lookahead", torch.float32),
    (ScheduleFree, "ScheduleFree", torch.float32),
    (DAdaptSGD, "DAdaptSGD writes", torch.float32),
    (zero, "ZeroRedundancyOptimizer", torch.float32),
]


@pytest.mark.parametrize("form", ["register", "hook"])
def test_optimizers_that_keep_the_weights_elsewhere(form: Form) -> None:
    """Each average was undone by the next step, or every shard trained on one rank's data."""
    run_ranks(refused, 2, KINDS, form, timeout=30.0)


# What is innocent.


class ClippedAdamW(AdamW):
    """Keeps the weights within bounds, after the step that it inherits."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.clamp_(-0.2, 0.2)
        return result


class TwiceClipped(ClippedAdamW):
    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.clamp_(min=-0.1)
        return result


def asgd(model: nn.Module) -> Sequence[Optimizer]:
    """Whose running mean equals the parameters, bit for bit, until it is told to start."""
    return [ASGD(trained(model), lr=0.05)]


def clipped(model: nn.Module) -> Sequence[Optimizer]:
    return [ClippedAdamW(trained(model), lr=0.05)]


def twice_clipped(model: nn.Module) -> Sequence[Optimizer]:
    return [TwiceClipped(trained(model), lr=0.05)]


def momentum(model: nn.Module) -> Sequence[Optimizer]:
    return [SGD(trained(model), lr=0.05, momentum=0.9)]


def adam_amsgrad(model: nn.Module) -> Sequence[Optimizer]:
    return [Adam(trained(model), lr=0.02, amsgrad=True)]


def adagrad(model: nn.Module) -> Sequence[Optimizer]:
    return [Adagrad(trained(model), lr=0.02)]


def rmsprop(model: nn.Module) -> Sequence[Optimizer]:
    return [RMSprop(trained(model), lr=0.01, momentum=0.9, centered=True)]


def rprop(model: nn.Module) -> Sequence[Optimizer]:
    return [Rprop(trained(model), lr=0.01)]


# torch wraps the `step` of every class that it has seen an instance of: with AdamW before its
# subclasses, the hooks run inside theirs too.
INNOCENT = (adamw, asgd, clipped, twice_clipped, momentum, adam_amsgrad, adagrad, rmsprop, rprop)


@pytest.mark.parametrize("form", ["register", "hook"])
def test_optimizers_that_only_look_like_them(form: Form) -> None:
    """A boundary of a subclass runs after all of its step, and so is not undone by its rest."""
    cases = [
        Case(algorithm, {"tau": tau}, optimizers=optimizers, steps=8)
        for optimizers in INNOCENT
        for algorithm, tau in (("LocalSGD", 1), ("OverlapLocalSGD", 2))
    ]
    assert_ranks_follow(cases, run_ranks(trajectories, 2, cases, form))


def zeros(dtype: torch.dtype) -> nn.Module:
    model = ragged_model(dtype)
    for p in model.parameters():
        nn.init.zeros_(p)
    return model


def no_gradient(model: nn.Module, rank: int, step: int) -> None:
    torch.autograd.backward(model(torch.zeros(1, 5)).sum() * 0)


def small_steps(model: nn.Module) -> Sequence[Optimizer]:
    """Rounded away in bf16: an average is not undone where the next step changes nothing."""
    return [SGD(trained(model), lr=1e-6)]


def test_parameters_that_do_not_move() -> None:
    """Zeros everywhere: every buffer of the optimizer equals the parameters."""
    cases = [
        *(
            Case("LocalSGD", {"tau": 2}, model=zeros, backward=no_gradient, optimizers=each)
            for each in (momentum, adam_amsgrad, asgd)
        ),
        Case("OverlapLocalSGD", {"tau": 2}, dtype=torch.bfloat16, optimizers=small_steps),
    ]
    assert_ranks_follow(cases, run_ranks(trajectories, 2, cases))


REMEMBERING = (FromTheStart, FromAList)
WARM_UP = (0.0, 0.0, 0.02, 0.05)
TOO_SMALL = (1e-9,)
"""For bf16, at any of these weights."""
TO_AND_FRO = (2**-9, -(2**-9)) * 6
"""With a constant gradient: some of the weights go to another number of bf16 and back."""


def ones(model: nn.Module, rank: int, step: int) -> None:
    torch.autograd.backward(loss(model, rank, step))
    for p in trained(model):
        p.grad = torch.ones_like(p)


def remembering(
    kind: Callable[[Any, Sequence[float]], Optimizer], rates: Sequence[float], model: nn.Module
) -> Sequence[Optimizer]:
    return [kind(trained(model), rates)]


@pytest.mark.parametrize("form", ["register", "hook"])
def test_optimizers_that_remember_where_they_started(form: Form) -> None:
    """Before the weights have moved, what an optimizer measures from equals them, bit for bit."""
    cases = [
        Case(algorithm, {"tau": tau}, dtype=dtype, optimizers=partial(remembering, kind, rates))
        for kind in REMEMBERING
        for algorithm, tau in (("LocalSGD", 1), ("OverlapLocalSGD", 2))
        for dtype, rates in ((torch.float32, WARM_UP), (torch.bfloat16, TOO_SMALL))
    ] + [
        Case(
            "OverlapLocalSGD",
            {"tau": 20},
            dtype=torch.bfloat16,
            optimizers=partial(remembering, kind, TO_AND_FRO),
            backward=ones,
        )
        for kind in REMEMBERING
    ]
    for outcome in run_ranks(steps_of, 2, cases, form):
        assert outcome == [case.steps for case in cases]


def steps_of(cases: Sequence[Case], form: Form) -> list[int]:
    counts = []
    for case in cases:
        trainer = Trainer(case, form)
        for _ in range(case.steps):
            trainer.step()
        trainer.state.finish()
        counts.append(trainer.state.stats.step)
    return counts


def masters_that_move_late() -> None:
    case = Case("LocalSGD", {"tau": 2}, optimizers=lambda model: [LateMasters(trained(model))])
    trainer = Trainer(case)
    for _ in range(12):
        trainer.step()
    with pytest.raises(commhooks.RegistrationError, match="LateMasters keeps copies"):
        trainer.step()


def test_masters_are_found_at_the_first_step_that_moves_the_weights() -> None:
    run_ranks(masters_that_move_late, 2)


def one_layer(dtype: torch.dtype) -> nn.Module:
    return initialise(nn.Linear(5, 3)).to(dtype)


def lbfgs() -> None:
    """It evaluates several times a step, so that a step of it is several of the state's."""
    trainer = Trainer(Case("LocalSGD", {"tau": 4}, model=one_layer, optimizers=_lbfgs))
    (optimizer,) = trainer.optimizers

    def closure() -> float:
        optimizer.zero_grad()
        trainer.backward()
        return 1.0

    for _ in range(3):
        optimizer.step(closure)
    trainer.state.finish()


def _lbfgs(model: nn.Module) -> Sequence[Optimizer]:
    return [LBFGS(trained(model), lr=0.01, max_iter=4, tolerance_grad=0, tolerance_change=-1)]


def test_an_optimizer_that_keeps_directions() -> None:
    run_ranks(lbfgs, 2)
