"""Pins SlowMo under learning-rate schedules, where the paper's u and a plain momentum differ."""

from collections.abc import Callable, Mapping, Sequence
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


def own_factor(worker: int, group: int, step: int) -> float:
    """Every worker lowers the rates of its parameter groups at steps of its own."""
    return float(0.5 ** (step * (worker + group) // 4))


def follow(worker: int, optimizers: Sequence[Optimizer], first: Sequence[float], step: int) -> None:
    """Set the rates in force after a step, as a schedule that follows a worker's own loss does."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for number, (group, rate) in enumerate(zip(groups, first, strict=True)):
        group["lr"] = rate * own_factor(worker, number, step)


def rates_of(optimizers: Sequence[Optimizer]) -> list[float]:
    return [float(group["lr"]) for each in optimizers for group in each.param_groups]


Kept = Mapping[str, Sequence[Tensor]]


def on_own_schedules(cases: Sequence[Case]) -> list[tuple[list[Tensor], Kept]]:
    """The parameters after every step, and the vectors that all workers should share."""
    found = []
    for case in cases:
        trainer = Trainer(case)
        first = rates_of(trainer.optimizers)
        steps = []
        for step in range(1, case.steps + 1):
            steps.append(trainer.step())
            follow(trainer.rank // case.island, trainer.optimizers, first, step)
        found.append((steps, trainer.state.state_dict()["fragments"][0]["vectors"]))
    return found


def expected_on_own_schedules(case: Case, size: int) -> list[list[Tensor]]:
    workers = reference_workers(case, size)
    first = rates_of(workers.optimizers[0])
    steps = []
    for step in range(1, case.steps + 1):
        steps.append([x for x in workers.step(case.worker_backward) for _ in range(case.island)])
        for worker, optimizers in enumerate(workers.optimizers):
            follow(worker, optimizers, first, step)
    return steps


@pytest.mark.parametrize(("size", "island"), [(2, 1), (3, 1), (4, 2)])
def test_workers_whose_rates_differ_share_their_vectors(size: int, island: int) -> None:
    """The momentum is rescaled by what the workers have agreed on, and not by each one's own."""
    cases = [
        Case(
            "SlowMo",
            {"tau": tau, "beta": 0.7, "lr": 0.9},
            optimizers=optimizers,
            dtype=torch.float64,
            island=island,
            compression=compression,
        )
        for tau, optimizers, compression in (
            (1, groups_of_sgd, None),
            (3, two_optimizers, None),
            (2, groups_of_sgd, "int8"),
        )
    ]
    ranks = run_ranks(on_own_schedules, size, cases)
    for case, *of_ranks in zip(cases, *ranks, strict=True):
        real = [steps for steps, _ in of_ranks]
        if case.compression is None:
            assert_follows(case, real, expected_on_own_schedules(case, size))
        for rank, (_, vectors) in enumerate(of_ranks):
            peer = of_ranks[rank % island][1]
            for name in ("z", "v"):
                for mine, theirs in zip(vectors[name], peer[name], strict=True):
                    assert torch.equal(mine, theirs), (case, rank, name)
