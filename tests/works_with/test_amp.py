"""Pins rounds under mixed precision: autocast, GradScaler, and steps skipped on one rank alone."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import commhooks
from tests.cases import Case, two_cases
from tests.expected import assert_close, assert_follows, assert_ranks_follow, reference_workers
from tests.harness import run_ranks
from tests.training import Trainer, trajectories
from tests.workload import MakeOptimizers, adamw, loss, nesterov_sgd, trained


def autocast_gradient(model: nn.Module, rank: int, step: int) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(model, rank, step)
    torch.autograd.backward(value)


def test_autocast_without_a_scaler() -> None:
    cases = two_cases(backward=autocast_gradient, warmup_steps=1)
    assert_ranks_follow(cases, run_ranks(trajectories, 2, cases))


class AutocastScaledTrainer(Trainer):
    """Both at once; on the CPU no gradient overflows."""

    def __init__(self, case: Case) -> None:
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        super().__init__(case, scaler=self.scaler)

    def backward(self) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss(self.model, self.rank, self.steps)
        torch.autograd.backward(self.scaler.scale(value))

    def optimize(self) -> None:
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def autocast_and_scaled(cases: Sequence[Case]) -> list[list[Tensor]]:
    return [[t.step() for _ in range(t.case.steps)] for t in map(AutocastScaledTrainer, cases)]


def test_autocast_with_a_scaler() -> None:
    """The scale is a power of two, so that it changes no bit."""
    cases = two_cases(backward=autocast_gradient, warmup_steps=1)
    assert_ranks_follow(cases, run_ranks(autocast_and_scaled, 2, cases))


def fused_sgd(model: nn.Module) -> Sequence[Optimizer]:
    return [SGD(trained(model), lr=0.05, momentum=0.9, nesterov=True, fused=True)]


def two_fused(model: nn.Module) -> Sequence[Optimizer]:
    return [
        SGD([p for p in trained(model) if p.ndim > 1], lr=0.05, fused=True),
        AdamW([p for p in trained(model) if p.ndim <= 1], lr=0.02, fused=True),
    ]


class ScaledTrainer(Trainer):
    """The loop of the AMP recipe; at the ``overflows`` this rank's loss is infinite."""

    growth_interval = 3

    def __init__(self, case: Case, give_scaler: bool, overflows: Sequence[int]) -> None:
        interval = self.growth_interval
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=interval)
        self.overflows = overflows
        super().__init__(case, scaler=self.scaler if give_scaler else None)

    def backward(self) -> None:
        value = loss(self.model, self.rank, self.steps)
        if self.steps in self.overflows:
            value = value * float("inf")
        torch.autograd.backward(self.scaler.scale(value))

    def optimize(self) -> None:
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad()


OVERFLOWS = {0: [3], 1: [2, 4, 5], 2: [6]}
"""By rank: rank 1 skips boundary steps of tau=2, rank 0 one of tau=3, and so on."""


def scaled_trajectory(case: Case, give_scaler: bool) -> tuple[list[Tensor], commhooks.Stats]:
    overflows = OVERFLOWS[torch.distributed.get_rank()]
    trainer = ScaledTrainer(case, give_scaler, overflows)
    steps = [trainer.step() for _ in range(case.steps)]
    trainer.state.finish()
    return steps, trainer.state.stats


@pytest.mark.parametrize("optimizers", [nesterov_sgd, adamw, fused_sgd, two_fused])
@pytest.mark.parametrize("give_scaler", [True, False], ids=["scaler", "unknown-scaler"])
def test_skipped_steps_keep_the_rounds_together(
    optimizers: MakeOptimizers, give_scaler: bool
) -> None:
    """A skipped step is a step: the same rounds everywhere, on time where the scaler is known."""
    for case in two_cases(optimizers=optimizers):
        real = run_ranks(scaled_trajectory, 3, case, give_scaler)
        workers = reference_workers(case, 3)
        skipped = {(rank, step) for rank, steps in OVERFLOWS.items() for step in steps}
        for step in range(1, case.steps + 1):
            x = workers.step(case.backward, skipped)
            for rank in range(3):
                late = step % case.tau == 0 and not give_scaler and (rank, step) in skipped
                if not late:
                    assert_close(case, real[rank][0][step - 1], x[rank], f"rank {rank}, {step}")
        rounds = {(stats.rounds_launched, stats.rounds_completed) for _, stats in real}
        assert rounds == {(case.steps // case.tau, case.steps // case.tau)}


class ForgetfulTrainer(Trainer):
    """Rank 1 leaves out some optimizer steps, with no scaler anybody could ask."""

    def optimize(self) -> None:
        if self.rank == 1 and self.steps in OVERFLOWS[1]:
            self.model.zero_grad()
        else:
            super().optimize()


def forgetful_trajectory(case: Case) -> list[Tensor]:
    """The parameters right before the next step's backward, after its forward."""
    trainer = ForgetfulTrainer(case)
    steps = []
    for _ in range(case.steps):
        trainer.step()
        trainer.model(torch.zeros(1, 5))  # where a boundary without its optimizer step runs
        steps.append(trainer.x)
    return steps


def test_a_step_left_out_does_not_leave_out_its_boundary() -> None:
    for case in two_cases():
        real = run_ranks(forgetful_trajectory, 2, case)
        workers = reference_workers(case, 2)
        skipped = {(1, step) for step in OVERFLOWS[1]}
        expected = [workers.step(case.backward, skipped) for _ in range(case.steps)]
        assert_follows(case, real, expected)


def test_overflow_in_warm_up_skips_everywhere() -> None:
    """Averaged gradients are infinite on every rank."""
    case = Case("OverlapLocalSGD", {"tau": 2}, warmup_steps=3, steps=8)
    real = run_ranks(warm_overflow, 2, case)
    workers = reference_workers(case, 2)
    skipped = {(0, 2), (1, 2)}
    assert_follows(case, real, [workers.step(case.backward, skipped) for _ in range(case.steps)])


def warm_overflow(case: Case) -> list[Tensor]:
    trainer = ScaledTrainer(case, True, [2] if torch.distributed.get_rank() == 1 else [])
    return [trainer.step() for _ in range(case.steps)]
