"""Pins loops that are not the textbook's: skipped steps, uneven inputs, odd orders, exceptions."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join

import commhooks
from tests.accelerated import Accelerated, Scaling, normed
from tests.cases import PERIODIC, Case, one_case, two_cases, with_tau
from tests.expected import (
    assert_close,
    assert_follows,
    assert_shadowed,
    reference_trajectory,
    reference_workers,
)
from tests.harness import rank_outcomes, run_ranks
from tests.training import Trainer
from tests.workload import MakeOptimizers, adamw, gradient, nesterov_sgd
from tests.works_with.test_amp import OVERFLOWS, ScaledTrainer, fused_sgd, two_fused


def every_periodic(tau: int = 2, **settings: Any) -> list[Case]:
    return [Case(name, next(with_tau(name, tau)), **settings) for name in PERIODIC]


# GradScaler.


class TalkingTrainer(ScaledTrainer):
    """A loop with a collective of its own right after every step, skipped or not."""

    def optimize(self) -> None:
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
            total = torch.ones(1)
            dist.all_reduce(total)
            assert total.item() == dist.get_world_size()
        self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def talk(cases: Sequence[Case]) -> list[tuple[list[Tensor], commhooks.Stats]]:
    runs = []
    for case in cases:
        trainer = TalkingTrainer(case, True, OVERFLOWS[dist.get_rank()])
        steps = [trainer.step() for _ in range(case.steps)]
        trainer.state.finish()
        runs.append(([*steps, trainer.x], trainer.state.stats))
    return runs


@pytest.mark.parametrize("optimizers", [nesterov_sgd, adamw, fused_sgd, two_fused])
def test_a_collective_right_after_a_skipped_step(optimizers: MakeOptimizers) -> None:
    """Every algorithm; ranks skip different steps, boundaries among them."""
    cases = every_periodic(optimizers=optimizers, dtype=torch.float64)
    skipped = {(rank, step) for rank, steps in OVERFLOWS.items() for step in steps}
    for case, *runs in zip(cases, *run_ranks(talk, 3, cases), strict=True):
        workers = reference_workers(case, 3)
        expected = [workers.step(case.backward, skipped) for _ in range(case.steps)]
        assert_follows(case, [x[:-1] for x, _ in runs], expected)
        assert {s.rounds_completed for _, s in runs} == {case.steps // case.tau}
        assert all(torch.equal(x[-1], runs[0][0][-1]) for x, _ in runs)
        assert_close(case, runs[0][0][-1], workers.consensus, "consensus")


def first_local_step_skipped(cases: Sequence[Case]) -> list[tuple[Tensor, Tensor]]:
    """Rank 1 skips the first local step; the consensus right after it, and after finish()."""
    ends = []
    for case in cases:
        trainer = ScaledTrainer(case, True, [2] if dist.get_rank() == 1 else [])
        for _ in range(2):
            trainer.step()
        with trainer.state.averaged():
            inside = trainer.x
        trainer.state.finish()
        ends.append((inside, trainer.x))
    return ends


def test_averaged_right_after_a_rank_skipped_the_first_local_step() -> None:
    """Its parameters are those of the warm-up still; the others' are not."""
    cases = every_periodic(warmup_steps=1, dtype=torch.float64)
    for case, *ends in zip(cases, *run_ranks(first_local_step_skipped, 3, cases), strict=True):
        workers = reference_workers(case, 3)
        for _ in range(2):
            workers.step(case.backward, {(1, 2)})
        for inside, finished in ends:
            assert_close(case, inside, workers.consensus, "averaged()")
            assert_close(case, finished, workers.consensus, "finish()")


def accelerated_overflows(cases: Sequence[Case]) -> list[tuple[Tensor, commhooks.Stats, int]]:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    runs = []
    for case in cases:
        for shared in (AcceleratorState, GradientState, PartialState):
            shared._reset_state()
        run = Accelerated(case, Scaling({rank: list(steps) for rank, steps in OVERFLOWS.items()}))
        skipped = 0
        for _ in range(case.steps):
            scale = run.accelerator.scaler.get_scale()
            run.step(after_optimizers=lambda: dist.barrier())
            # Accelerate's own word for it does not know fused optimizers.
            skipped += run.accelerator.scaler.get_scale() < scale
        run.state.finish()
        runs.append((run.x, run.state.stats, skipped))
    return runs


def test_skipped_steps_through_accelerate() -> None:
    """Running statistics of BatchNorm included in what all end on."""
    cases = [
        normed(case)
        for optimizers in (nesterov_sgd, fused_sgd)
        for case in every_periodic(optimizers=optimizers)
    ]
    for case, *ends in zip(cases, *run_ranks(accelerated_overflows, 3, cases), strict=True):
        assert [skipped for _, _, skipped in ends] == [1, 3, 1]
        assert {stats.rounds_completed for _, stats, _ in ends} == {case.steps // case.tau}
        for x, _, _ in ends:
            assert torch.equal(x, ends[0][0]), str(case)


# Different numbers of batches.


def uneven(
    cases: Sequence[Case], lengths: Sequence[int], make: type[Trainer] = Trainer
) -> list[tuple[Tensor, commhooks.Stats]]:
    ends = []
    for case in cases:
        trainer = make(case)
        with Join([trainer.state, trainer.model]):
            for _ in range(lengths[trainer.rank]):
                trainer.step()
        ends.append((trainer.x, trainer.state.stats))
    return ends


# DDP exchanges its buckets' layout in the second forward, which some ranks never make.
@pytest.mark.parametrize("lengths", [(9, 4, 6), (1, 7, 7), (5, 5, 5), (0, 3, 8)])
def test_join_shadows_the_rounds(lengths: Sequence[int]) -> None:
    """A rank out of batches takes part with its last parameters, as if it skipped every step."""
    cases = [
        *every_periodic(1, dtype=torch.float64),
        *every_periodic(2),
        *every_periodic(2, ddp={"find_unused_parameters": True}),
        *every_periodic(3, optimizers=adamw),
        # In fp64, where no sum is so close to the middle between two integers as to go either way.
        *(
            one_case(name, 2, compression="int8", cap_mb=25.0, dtype=torch.float64)
            for name in PERIODIC
        ),
    ]
    for case, *ends in zip(cases, *run_ranks(uneven, 3, cases, lengths), strict=True):
        assert_shadowed(case, ends, lengths)


class Accumulating(Trainer):
    """Adds up the gradients of two forwards a step, of which DDP reduces the second alone."""

    def backward(self) -> None:
        with self.model.no_sync():
            self.case.backward(self.model, self.rank, self.steps)
        self.case.backward(self.model, self.rank, self.steps)


def twice(model: nn.Module, rank: int, step: int) -> None:
    for _ in range(2):
        gradient(model, rank, step)


def test_join_with_accumulation() -> None:
    """Only what DDP reduces is a step, also for those who are out of batches."""
    cases, lengths = every_periodic(2, dtype=torch.float64), (6, 3, 4)
    real = run_ranks(uneven, 3, cases, lengths, Accumulating)
    for case, *ends in zip(cases, *real, strict=True):
        assert_shadowed(replace(case, backward=twice), ends, lengths)


def uneven_without_join(case: Case, lengths: Sequence[int]) -> None:
    trainer = Trainer(case)
    for _ in range(lengths[trainer.rank]):
        trainer.step()
    with trainer.state.averaged():
        pass


@pytest.mark.parametrize("algorithm", PERIODIC)
def test_without_join_every_rank_is_told(algorithm: str) -> None:
    """Of an evaluation, that is; `finish` waits for the rest of the others' steps."""
    case = Case(algorithm, next(with_tau(algorithm, 2)))
    for end in rank_outcomes(uneven_without_join, 2, case, (4, 28), group_timeout=30.0):
        assert isinstance(end.error, commhooks.RoundError), end.describe()
        assert "the ranks are not at the same point" in str(end.error)
        assert "torch.distributed.algorithms.Join" in str(end.error)


def joined_again(case: Case) -> list[Tensor]:
    """The first context is left by an exception, on every rank at the same step."""
    trainer = Trainer(case)
    with (
        contextlib.suppress(ZeroDivisionError),
        Join([trainer.state, trainer.model], throw_on_early_termination=False),
    ):
        trainer.step()
        raise ZeroDivisionError
    for lengths in ((3, 2), (1, 4)):
        with Join([trainer.state, trainer.model]):
            for _ in range(lengths[trainer.rank]):
                trainer.step()
    return [trainer.x]


def test_join_again_and_after_an_exception() -> None:
    """A context that an exception left kept announcing, and the next one's counts were off."""
    for case in two_cases():
        (x,), (y,) = run_ranks(joined_again, 2, case)
        assert torch.equal(x, y)


# The user's loop.


class Twice(Trainer):
    """Steps its optimizers twice a backward."""

    def optimize(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        super().optimize()


class Never(Trainer):
    """Never steps on rank 1."""

    def optimize(self) -> None:
        if self.rank != 1:
            super().optimize()
        else:
            self.model.zero_grad()


class ZeroGradFirst(Trainer):
    def step(self) -> Tensor:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        return super().step()

    def optimize(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


class ZeroGradOfTheModel(Trainer):
    """With gradients kept in place, and zeroed twice."""

    def optimize(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        self.model.zero_grad(set_to_none=False)


class Evaluates(Trainer):
    """On rank 0 alone, in all the places where nothing waits for an optimizer step."""

    def step(self) -> Tensor:
        self.look()
        super().step()
        self.look()
        return self.x

    def look(self) -> None:
        if self.rank == 0:
            self.model.eval()
            with torch.no_grad():
                self.model(torch.zeros(2, 5))
            self.model.train()  # type: ignore[no-untyped-call]
            self.model.module(torch.zeros(1, 5))


class LooksBeforeTheStep(Trainer):
    """Evaluates and saves between a backward and its step."""

    def optimize(self) -> None:
        with self.state.averaged():
            pass
        self.state.state_dict()
        super().optimize()


class Stumbles(Trainer):
    """Its loop raises, is caught and goes on: before the forward, after it, after the step."""

    def step(self) -> Tensor:
        for where in ("before", "after forward"):
            with contextlib.suppress(ZeroDivisionError):
                if where == "after forward":
                    self.model(torch.zeros(1, 5))
                raise ZeroDivisionError
        super().step()
        with contextlib.suppress(ZeroDivisionError), self.state.averaged(), self.state.averaged():
            raise ZeroDivisionError
        return self.x


MakeTrainer = Callable[[Case], Trainer]


def run_all(
    make: MakeTrainer, cases: Sequence[Case]
) -> list[tuple[list[Tensor], Tensor, commhooks.Stats]]:
    runs = []
    for case in cases:
        trainer = make(case)
        steps = [trainer.step() for _ in range(case.steps)]
        trainer.state.finish()
        runs.append((steps, trainer.x, trainer.state.stats))
    return runs


@pytest.mark.parametrize("make", [ZeroGradFirst, ZeroGradOfTheModel, Evaluates, Stumbles])
def test_loops_that_change_nothing(make: MakeTrainer) -> None:
    cases = two_cases(warmup_steps=1)
    for case, *runs in zip(cases, *run_ranks(run_all, 2, make, cases), strict=True):
        assert_follows(case, [steps for steps, _, _ in runs], reference_trajectory(case, 2))


@pytest.mark.parametrize("make", [Twice, Never, LooksBeforeTheStep])
def test_loops_that_step_otherwise_stay_in_the_same_rounds(make: MakeTrainer) -> None:
    """A round for every tau backwards, whatever the optimizers do; one model at the end."""
    cases = [*every_periodic(2), *every_periodic(3)]
    for case, (_, x, stats), (_, y, other) in zip(
        cases, *run_ranks(run_all, 2, make, cases), strict=True
    ):
        # Rank 1, which never steps, is one boundary late: it runs at the next forward, or here.
        assert stats.rounds_completed == other.rounds_completed == case.steps // case.tau
        assert torch.equal(x, y)
        assert x.isfinite().all()
