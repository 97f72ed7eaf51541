"""Pins that any torch.optim optimizer, two on one model, and lr schedules give the trajectory."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import StepLR

from tests.cases import PERIODIC, Case, two_cases, with_tau
from tests.expected import assert_follows, assert_ranks_follow, reference_workers
from tests.harness import run_ranks
from tests.training import Form, Trainer, trajectories
from tests.workload import (
    MakeOptimizers,
    adamw,
    gradient,
    nesterov_sgd,
    trained,
    weights_and_biases,
)


def foreach_sgd(model: nn.Module) -> Sequence[Optimizer]:
    return [SGD(trained(model), lr=0.05, momentum=0.9, nesterov=True, foreach=True)]


def fused_sgd(model: nn.Module) -> Sequence[Optimizer]:
    return [SGD(trained(model), lr=0.05, momentum=0.9, nesterov=True, fused=True)]


def foreach_adamw(model: nn.Module) -> Sequence[Optimizer]:
    return [AdamW(trained(model), lr=0.02, foreach=True)]


def fused_adamw(model: nn.Module) -> Sequence[Optimizer]:
    return [AdamW(trained(model), lr=0.02, fused=True)]


def muon_and_adamw(model: nn.Module) -> Sequence[Optimizer]:
    """Muon for the matrices, AdamW for the rest."""
    return [
        Muon([p for p in trained(model) if p.ndim == 2], lr=0.02),
        AdamW([p for p in trained(model) if p.ndim != 2], lr=0.02),
    ]


@pytest.mark.parametrize("optimizers", [foreach_sgd, fused_sgd, foreach_adamw, fused_adamw])
def test_variants_of_one_optimizer(optimizers: MakeOptimizers) -> None:
    cases = two_cases(optimizers=optimizers)
    assert_ranks_follow(cases, run_ranks(trajectories, 2, cases))


@pytest.mark.parametrize("form", ["register", "hook"])
@pytest.mark.parametrize("optimizers", [muon_and_adamw, weights_and_biases])
def test_two_optimizers_on_one_model(optimizers: MakeOptimizers, form: Form) -> None:
    """With tau=1 a boundary that ran after the first of them would mix half a step."""
    cases = [
        Case("LocalSGD", {"tau": 1}, optimizers=optimizers),
        Case("EASGD", {"tau": 1}, warmup_steps=2, optimizers=optimizers),
        *two_cases(optimizers=optimizers),
    ]
    assert_ranks_follow(cases, run_ranks(trajectories, 2, cases, form))


class ClosureTrainer(Trainer):
    """Its optimizer runs forward and backward itself, as Lightning's loop does."""

    def closure(self) -> float:
        self.backward()
        return 0.0

    def step(self) -> Tensor:
        self.steps += 1
        (optimizer,) = self.optimizers
        optimizer.step(self.closure)
        optimizer.zero_grad()
        return self.x


def closure_trajectories(cases: Sequence[Case], form: Form) -> list[list[Tensor]]:
    runs = []
    for case in cases:
        trainer = ClosureTrainer(case, form)
        steps = [trainer.step() for _ in range(6)]
        trainer.state.finish()
        runs.append([*steps, *(trainer.step() for _ in range(6))])
    return runs


@pytest.mark.parametrize("form", ["register", "hook"])
@pytest.mark.parametrize("optimizers", [nesterov_sgd, adamw])
def test_a_closure(optimizers: MakeOptimizers, form: Form) -> None:
    """The vectors must start before the first local update, of which the backward is part."""
    cases = [
        Case(name, arguments, warmup_steps, optimizers)
        for name in PERIODIC
        for tau in (1, 2)
        for arguments in with_tau(name, tau)
        for warmup_steps in (0, 2)
    ]
    for case, *real in zip(cases, *run_ranks(closure_trajectories, 2, cases, form), strict=True):
        workers = reference_workers(case, 2)
        expected = [workers.step(case.backward) for _ in range(6)]
        workers.finish()
        expected += [workers.step(case.backward) for _ in range(6)]
        assert_follows(case, real, expected)


def scheduled_trajectory(case: Case, form: Form) -> list[Tensor]:
    trainer = Trainer(case, form)
    schedulers = [StepLR(optimizer, 2, gamma=0.5) for optimizer in trainer.optimizers]
    steps = []
    for _ in range(case.steps):
        steps.append(trainer.step())
        for scheduler in schedulers:
            scheduler.step()
    return steps


@pytest.mark.parametrize("form", ["register", "hook"])
def test_a_learning_rate_that_changes_in_the_middle_of_a_round(form: Form) -> None:
    case = Case("OverlapLocalSGD", {"tau": 3, "beta": 0.7}, warmup_steps=1)
    real = run_ranks(scheduled_trajectory, 2, case, form)
    workers = reference_workers(case, 2)
    expected = []
    for step in range(1, case.steps + 1):
        expected.append(workers.step(gradient))
        if step % 2 == 0:
            for optimizer in workers.all_optimizers:
                for group in optimizer.param_groups:
                    group["lr"] *= 0.5
    assert_follows(case, real, expected)


def optimizer_state_is_local(case: Case) -> bool:
    """Whether every buffer of the optimizer is that of a worker nobody ever averaged with."""
    trainer = Trainer(case)
    alone = case.model(case.dtype)
    (optimizer,) = case.optimizers(alone)
    for step in range(1, 4):
        trainer.step()
        alone.zero_grad()
        gradient(alone, trainer.rank, step)
        optimizer.step()
    mine = trainer.optimizers[0].state_dict()["state"]
    return all(
        torch.equal(mine[index][name], value)
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    )


def test_optimizer_state_is_never_touched() -> None:
    """After the first averaging, before its effect on the next gradient."""
    assert run_ranks(optimizer_state_is_local, 2, Case("LocalSGD", {"tau": 3})) == [True, True]
