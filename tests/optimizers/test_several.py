"""Pins when a boundary runs where several optimizers step one model, some of them rarely or late.

It runs once all have stepped since the latest backward, or else before the next training forward.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from tests.cases import Case
from tests.expected import assert_close, reference_workers
from tests.harness import run_ranks
from tests.optimizers.warnings_of import logged_warnings
from tests.training import Form, Trainer
from tests.workload import plain_sgd, trained, weights_and_biases


def settled(trainer: Trainer) -> Tensor:
    """The parameters once a boundary that no optimizer has ended was run by the next forward."""
    trainer.model(torch.zeros(1, 5))
    return trainer.x


# One that steps rarely, and first.


class EveryFourth(SGD):
    """The reference's part: asked at every step, it moves at every fourth."""

    asked = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.asked += 1
        if self.asked % 4 == 0:
            super().step()


def often_and_rarely(model: nn.Module) -> Sequence[Optimizer]:
    return [
        SGD([p for p in trained(model) if p.ndim > 1], lr=0.05, momentum=0.9),
        SGD([p for p in trained(model) if p.ndim <= 1], lr=0.05, momentum=0.9),
    ]


def as_often_as_asked(model: nn.Module) -> Sequence[Optimizer]:
    often, rarely = often_and_rarely(model)
    return [often, EveryFourth(rarely.param_groups[0]["params"], lr=0.05, momentum=0.9)]


class Rarely(Trainer):
    """The second optimizer steps before the first, at every fourth step."""

    def optimize(self) -> None:
        often, rarely = self.optimizers
        if self.steps % 4 == 0:
            rarely.step()
        often.step()
        self.model.zero_grad()


Look = Callable[[Trainer], object]


def nothing(trainer: Trainer) -> None:
    pass


def averaged(trainer: Trainer) -> None:
    with trainer.state.averaged():
        pass


def state_dict(trainer: Trainer) -> None:
    trainer.state.state_dict()


def rarely(cases: Sequence[Case], looks: Sequence[Look], form: Form) -> list[list[Tensor]]:
    runs = []
    for case in cases:
        for look in looks:
            trainer, steps = Rarely(case, form), []
            for step in range(case.steps):
                trainer.step()
                if step or form == "register":
                    look(trainer)
                steps.append(settled(trainer))
            runs.append(steps)
    return runs


@pytest.mark.parametrize("form", ["register", "hook"])
def test_a_look_before_a_rare_optimizer_steps_changes_nothing(form: Form) -> None:
    """An optimizer that had stepped before the look counted for the boundary after it."""
    cases = [
        Case("LocalSGD", {"tau": 2}, optimizers=often_and_rarely),
        Case("CoCoDSGD", {"tau": 2}, optimizers=often_and_rarely),
        Case("EASGD", {"tau": 3}, warmup_steps=1, optimizers=often_and_rarely),
    ]
    looks = [nothing, averaged, state_dict]
    runs = iter(zip(*run_ranks(rarely, 2, cases, looks, form), strict=True))
    for case in cases:
        for look in looks:
            check(replace(case, optimizers=as_often_as_asked), next(runs), look.__name__)


def check(case: Case, ranks: Sequence[Sequence[Tensor]], what: str) -> None:
    workers = reference_workers(case, len(ranks))
    for step in range(len(ranks[0])):
        for rank, x in enumerate(workers.step(case.backward)):
            assert_close(case, ranks[rank][step], x, f"{what}: rank {rank}, step {step + 1}")


# The first steps of all.


class LooksBeforeTheFirstStep(Trainer):
    """An evaluation between the first backward and the optimizers' first steps."""

    def optimize(self) -> None:
        if self.steps == 1:
            with torch.no_grad():
                self.model(torch.zeros(2, 5))
        super().optimize()


class SkipsTheFirstStep(Trainer):
    """No optimizer has stepped when the second forward comes."""

    def optimize(self) -> None:
        if self.steps == 1:
            self.model.zero_grad()
        else:
            super().optimize()


FIRST_STEPS = (LooksBeforeTheFirstStep, SkipsTheFirstStep)


def first_steps(cases: Sequence[Case], form: Form) -> list[list[Tensor]]:
    runs = []
    for case in cases:
        for make in FIRST_STEPS:
            trainer = make(case, form)
            first = trainer.step()
            if make is SkipsTheFirstStep:
                first = settled(trainer)
            runs.append([first, *(trainer.step() for _ in range(case.steps - 1))])
    return runs


@pytest.mark.parametrize("form", ["register", "hook"])
def test_the_first_of_two_optimizers_does_not_pass_for_the_only_one(form: Form) -> None:
    """The bare form, which has to learn of them, ran the boundary between their first steps."""
    cases = [
        Case("LocalSGD", {"tau": 1}, optimizers=weights_and_biases, steps=5),
        Case("OverlapLocalSGD", {"tau": 1}, optimizers=weights_and_biases, steps=5),
        Case("BMUF", {"tau": 2}, optimizers=weights_and_biases, steps=6),
    ]
    runs = iter(zip(*run_ranks(first_steps, 2, cases, form), strict=True))
    for case in cases:
        for make in FIRST_STEPS:
            real, workers = next(runs), reference_workers(case, 2)
            skipped = {(0, 1), (1, 1)} if make is SkipsTheFirstStep else ()
            for step in range(case.steps):
                for rank, x in enumerate(workers.step(case.backward, skipped)):
                    where = f"{make.__name__}: rank {rank}, step {step + 1}"
                    assert_close(case, real[rank][step], x, where)


# Optimizers that come later.


class NewOptimizer(Trainer):
    """From the fourth step on with optimizers that nobody has told the state of."""

    late: Callable[[nn.Module], Sequence[Optimizer]] = staticmethod(plain_sgd)

    def optimize(self) -> None:
        if self.steps == 4:
            self.optimizers = self.late(self.model)
        super().optimize()


def plain_halves(model: nn.Module) -> Sequence[Optimizer]:
    """The same updates as `plain_sgd`, by two optimizers."""
    return [SGD([p for p in trained(model) if (p.ndim > 1) is w], lr=0.05) for w in (True, False)]


class TwoNewOptimizers(NewOptimizer):
    late = staticmethod(plain_halves)


def replaced(cases: Sequence[Case], form: Form) -> list[tuple[list[Tensor], list[str]]]:
    runs = []
    for case in cases:
        for make in (NewOptimizer, TwoNewOptimizers):
            with logged_warnings() as texts:
                trainer, steps = make(case, form), []
                for _ in range(case.steps):
                    trainer.step()
                    steps.append(settled(trainer))
            runs.append((steps, texts))
    return runs


def test_a_new_optimizer_is_taken_in_with_a_warning() -> None:
    cases = [
        Case(name, {"tau": tau}, optimizers=plain_sgd)
        for name, tau in (("LocalSGD", 2), ("LocalSGD", 1), ("CoCoDSGD", 3))
    ]
    runs = iter(zip(*run_ranks(replaced, 2, cases, "register"), strict=True))
    for case in cases:
        for number in (1, 2):
            ranks = next(runs)
            check(case, [steps for steps, _ in ranks], "new optimizer")
            for _, texts in ranks:
                assert (
                    len([text for text in texts if " SGD updates parameters" in text]) == number
                ), texts


def of_the_weights(model: nn.Module) -> Sequence[Optimizer]:
    return [SGD([p for p in trained(model) if p.ndim > 1], lr=0.05)]


class ForgottenOptimizer(Trainer):
    """The state was given the weights' optimizer; the biases' steps after it from the start."""

    forgotten: Optimizer | None = None

    def optimize(self) -> None:
        if self.forgotten is None:
            self.forgotten = AdamW([p for p in trained(self.model) if p.ndim <= 1], lr=0.02)
            self.optimizers = [*self.optimizers, self.forgotten]
        super().optimize()


def forgotten(cases: Sequence[Case]) -> list[list[Tensor]]:
    runs = []
    for case in cases:
        trainer = ForgottenOptimizer(case)
        trainer.step()
        runs.append([trainer.step() for _ in range(case.steps - 1)])
    return runs


def both(model: nn.Module) -> Sequence[Optimizer]:
    biases = AdamW([p for p in trained(model) if p.ndim <= 1], lr=0.02)
    return [*of_the_weights(model), biases]


def test_an_optimizer_that_register_was_not_given_counts_from_its_first_step() -> None:
    """Its parameters were averaged before its step, again and again."""
    cases = [Case(name, {"tau": 2}, optimizers=of_the_weights) for name in ("LocalSGD", "EASGD")]
    for case, *real in zip(cases, *run_ranks(forgotten, 2, cases), strict=True):
        workers = reference_workers(replace(case, optimizers=both), 2)
        workers.step(case.backward)
        for step in range(case.steps - 1):
            for rank, x in enumerate(workers.step(case.backward)):
                assert_close(case, real[rank][step], x, f"rank {rank}, step {step + 2}")
