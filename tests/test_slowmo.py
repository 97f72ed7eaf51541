"""Pins SlowMo under learning-rate schedules, where the paper's u and a plain momentum differ."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from tests import reference
from tests.cases import Case
from tests.expected import assert_follows, reference_trajectory, reference_workers
from tests.harness import run_ranks
from tests.test_checkpoint import resumed, saved
from tests.training import Form, Trainer
from tests.workload import plain_sgd, trained

Schedule = Callable[[int], float]
"""The factor of a learning rate after so many steps."""


def halved(step: int) -> float:
    return float(0.5 ** (step // 3))


def warmed_up(step: int) -> float:
    """From 0 on."""
    return min(1.0, step / 4)


def up_and_down(step: int) -> float:
    return 1.0 + 0.75 * (step % 5 - 2) / 2


def constant(step: int) -> float:
    return 1.0


def groups_of_sgd(model: nn.Module) -> Sequence[Optimizer]:
    """Weights, and biases that learn at another rate."""
    weights = [p for p in trained(model) if p.ndim > 1]
    biases = [p for p in trained(model) if p.ndim == 1]
    groups = [{"params": weights, "lr": 0.05}, {"params": biases, "lr": 0.2}]
    return [SGD(groups, momentum=0.9, nesterov=True, weight_decay=1e-2)]


def two_optimizers(model: nn.Module) -> Sequence[Optimizer]:
    weights = [p for p in trained(model) if p.ndim > 1]
    biases = [p for p in trained(model) if p.ndim == 1]
    return [SGD([{"params": weights}], lr=0.05), AdamW([{"params": biases}], lr=0.02)]


def rate_as_a_tensor(model: nn.Module) -> Sequence[Optimizer]:
    parameters = trained(model)
    groups = [
        {"params": parameters[:1], "lr": torch.tensor(0.02)},
        {"params": parameters[1:], "lr": torch.tensor(0.03)},
    ]
    return [AdamW(groups, lr=torch.tensor(0.02))]


SCHEDULES: Sequence[Sequence[Schedule]] = [
    (halved, halved),
    (warmed_up, warmed_up),
    (up_and_down, warmed_up),
    (constant, halved),
]
"""One for the weights and one for the biases."""


def schedulers(optimizers: Sequence[Optimizer], schedules: Sequence[Schedule]) -> list[LambdaLR]:
    """torch's own; the schedules go to the parameter groups in turn, of all optimizers."""
    rest = iter(schedules)
    return [LambdaLR(each, [next(rest) for _ in each.param_groups]) for each in optimizers]


class Scheduled(Trainer):
    """The usual loop: a scheduler steps right after its optimizer."""

    def __init__(self, case: Case, form: Form, schedules: Sequence[Schedule]) -> None:
        super().__init__(case, form)
        self.schedulers = schedulers(self.optimizers, schedules)

    def optimize(self) -> None:
        super().optimize()
        for scheduler in self.schedulers:
            scheduler.step()


Run = tuple[Case, Sequence[Schedule]]


def scheduled(runs: Sequence[Run], form: Form) -> list[list[Tensor]]:
    trainers = [Scheduled(case, form, schedules) for case, schedules in runs]
    return [[each.step() for _ in range(each.case.steps)] for each in trainers]


def expected(case: Case, size: int, schedules: Sequence[Schedule]) -> list[list[Tensor]]:
    workers = reference_workers(case, size)
    each = [s for optimizers in workers.optimizers for s in schedulers(optimizers, schedules)]
    steps = []
    for _ in range(case.steps):
        steps.append(workers.step(case.backward))
        for scheduler in each:
            scheduler.step()
    return steps


def runs() -> list[Run]:
    return [
        (
            Case(
                "SlowMo",
                {"tau": tau, "beta": 0.7, "lr": 0.9},
                warmup_steps,
                optimizers,
                torch.float64,
                steps=14,
            ),
            schedules,
        )
        for optimizers in (groups_of_sgd, two_optimizers, rate_as_a_tensor)
        for schedules in SCHEDULES
        for tau, warmup_steps in ((1, 0), (3, 0), (2, 3))
    ]


@pytest.mark.parametrize(("form", "size"), [("register", 2), ("hook", 3)])
def test_exact_under_a_schedule(form: Form, size: int) -> None:
    todo = runs()
    for (case, schedules), *real in zip(todo, *run_ranks(scheduled, size, todo, form), strict=True):
        assert_follows(case, real, expected(case, size, schedules))


def test_the_schedule_matters() -> None:
    """Else the test above would say nothing: a momentum that is not rescaled is another run."""
    case = replace(runs()[1][0], steps=9)
    with_schedule = expected(case, 2, (halved, halved))
    constant_steps = reference_trajectory(case, 2)
    assert torch.equal(with_schedule[2][0], constant_steps[2][0])
    assert not torch.allclose(with_schedule[8][0], constant_steps[8][0], atol=1e-6)


def resumed_between_rates(case: Case, form: Form) -> bool:
    """Saved after every step; the learning rate changes before the next boundary."""
    trainer = Scheduled(case, form, (halved, up_and_down))
    checkpoints, steps = [], []
    for _ in range(case.steps):
        steps.append(trainer.step())
        checkpoints.append((saved(trainer), [s.state_dict() for s in trainer.schedulers]))
    for step, (checkpoint, positions) in enumerate(checkpoints, start=1):
        again = resumed(case, form, step, checkpoint)
        each = schedulers(again.optimizers, (halved, up_and_down))
        for scheduler, position in zip(each, positions, strict=True):
            scheduler.load_state_dict(position)
            for group, rate in zip(
                scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True
            ):
                group["lr"] = rate
        for expected_x in steps[step:]:
            if not torch.equal(again.step(), expected_x):
                return False
            for scheduler in each:
                scheduler.step()
    return True


@pytest.mark.parametrize("form", ["register", "hook"])
def test_rates_are_part_of_a_checkpoint(form: Form) -> None:
    """What is remembered is in units of the last boundary's learning rate."""
    case = Case("SlowMo", {"tau": 2, "beta": 0.7}, 1, groups_of_sgd, steps=9)
    assert run_ranks(resumed_between_rates, 2, case, form) == [True, True]


def off_at_boundaries(step: int) -> float:
    """0 in the third step of every three, where u would have no finite value."""
    return (1.0, 0.5, 0.0)[step % 3]


def test_a_rate_of_zero_at_a_boundary() -> None:
    """What was learnt at other rates counts, and what is remembered is left as it is."""
    case = Case(
        "SlowMo", {"tau": 3, "beta": 0.7}, optimizers=plain_sgd, dtype=torch.float64, steps=12
    )
    todo: list[Run] = [(case, (off_at_boundaries,))]
    (real,) = zip(*run_ranks(scheduled, 2, todo, "register"), strict=True)
    workers = reference_workers(case, 2)
    each = [s for made in workers.optimizers for s in schedulers(made, (off_at_boundaries,))]
    algorithm = workers.algorithm = AtARateOfOne(3, 0.7)
    algorithm.start(workers.x, {})
    steps = []
    for _ in range(case.steps):
        steps.append(workers.step(case.backward))
        for scheduler in each:
            scheduler.step()
    assert_follows(case, real, steps)


class AtARateOfOne(reference.SlowMo):
    """The recursion in units of parameters, which knows no learning rate."""

    def step(self, k: int, x: Sequence[Tensor], gamma: Tensor) -> Sequence[Tensor]:
        return super().step(k, x, torch.ones_like(gamma))
