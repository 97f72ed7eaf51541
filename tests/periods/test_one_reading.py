"""Pins that no single reading of a rate or a loss decides on the rounds of a whole run."""

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedules
from torch.optim.lr_scheduler import LRScheduler

import commhooks
from commhooks.periods import QSR, AdaComm
from tests.cases import Case
from tests.harness import run_ranks
from tests.training import Trainer

STEPS = 120
PEAK = 0.05
"""The learning rate of the tests' optimizers, at which QSR wants ``TAU`` steps."""
TAU = 3


def warm_up(optimizer: Optimizer, steps: int) -> LRScheduler:
    """From 0 on."""
    return schedules.LambdaLR(optimizer, lambda step: min(1.0, step / steps))


def warm_up_by_epochs(optimizer: Optimizer) -> LRScheduler:
    return schedules.LambdaLR(optimizer, lambda step: min(1.0, (1 + step // 12) / 5))


def warm_up_and_cosine(optimizer: Optimizer) -> LRScheduler:
    first = schedules.LinearLR(optimizer, 1e-6, total_iters=40)
    rest = schedules.CosineAnnealingLR(optimizer, STEPS - 40, eta_min=PEAK / 2)
    return schedules.SequentialLR(optimizer, [first, rest], [40])


def off_now_and_then(optimizer: Optimizer) -> LRScheduler:
    """0 at one boundary of many."""
    return schedules.LambdaLR(optimizer, lambda step: 0.0 if 17 <= step <= 20 else 1.0)


SCHEDULES: Sequence[Callable[[Optimizer], LRScheduler]] = (
    partial(warm_up, steps=30),
    partial(warm_up, steps=90),
    warm_up_by_epochs,
    warm_up_and_cosine,
    off_now_and_then,
    partial(schedules.OneCycleLR, max_lr=PEAK, total_steps=STEPS + 1, div_factor=1e3),
    partial(schedules.CosineAnnealingWarmRestarts, T_0=40, eta_min=1e-5),
    partial(schedules.CyclicLR, base_lr=1e-7, max_lr=PEAK, step_size_up=20, cycle_momentum=False),
)


def inverse(step: int, rates: Sequence[float], stats: commhooks.Stats) -> int:
    """What a user may write who has not thought of a rate near 0."""
    return max(1, int(TAU * PEAK / max((*rates, 1e-12))))


def launched_under(schedule: Callable[[Optimizer], LRScheduler], case: Case) -> list[int]:
    """The steps after which there was one more round."""
    trainer = Trainer(case)
    (optimizer,) = trainer.optimizers
    scheduler = schedule(optimizer)
    launched = [0]
    for _ in range(STEPS):
        trainer.step()
        launched.append(trainer.state.stats.rounds_launched)
        scheduler.step()
    return [step for step, (a, b) in enumerate(pairwise(launched), 1) if b > a]


CASES = [
    Case("LocalSGD", {"tau": QSR(TAU, PEAK * math.sqrt(TAU))}),
    Case("OverlapLocalSGD", {"tau": QSR(TAU, PEAK * math.sqrt(TAU)), "beta": 0.7}),
    Case("DiLoCo", {"tau": QSR(TAU, PEAK * math.sqrt(TAU)), "fragments": 3, "delay": 1}),
    Case("LocalSGD", {"tau": inverse}),
]


def under(schedule: Callable[[Optimizer], LRScheduler]) -> list[list[int]]:
    return [launched_under(schedule, case) for case in CASES]


@pytest.mark.parametrize("number", range(len(SCHEDULES)))
def test_no_rate_stops_the_rounds(number: int) -> None:
    """A round is followed by another within the time that all before it have taken."""
    first, second = run_ranks(under, 2, SCHEDULES[number])
    assert first == second
    for case, at in zip(CASES, first, strict=True):
        assert at[0] <= TAU, case
        for before, after in pairwise((*at[:: case.fragments], STEPS)):
            assert after - before <= 2 * before + 2 * TAU, (case, at)


def test_a_warm_up_has_rounds_of_the_base_length() -> None:
    (at, *_), _ = run_ranks(under, 2, partial(warm_up, steps=90))
    assert at == list(range(TAU, STEPS + 1, TAU))


def told_by(rank: int, step: int, losses: str) -> float:
    """The loss of a step; the windows end after steps 6, 12, ... while tau stays."""
    usual = 4.0 * 0.9**step
    odd = {
        "inf": math.inf,
        "NaN": math.nan,
        "both infinities": math.inf if rank else -math.inf,
        "one rank's inf": usual if rank else math.inf,
        "0": 0.0,
        "below 0": -3.0,
    }
    return odd[losses] if step <= 6 else usual


def with_losses(losses: str) -> tuple[list[int], float | None, list[str]]:
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("commhooks").addHandler(handler)
    trainer = Trainer(Case("LocalSGD", {"tau": AdaComm(6)}))
    taus = []
    for step in range(1, 41):
        loss = told_by(dist.get_rank(), step, losses)
        trainer.state.observe(torch.tensor(loss) if step % 2 else loss)
        trainer.step()
        taus.append(trainer.state.stats.tau)
    return taus, trainer.state.stats.first_loss, heard


@pytest.mark.parametrize(
    "losses", ["inf", "NaN", "both infinities", "one rank's inf", "0", "below 0"]
)
def test_a_first_loss_without_meaning_is_passed_over(losses: str) -> None:
    (taus, first_loss, heard), (other, _, silent) = run_ranks(with_losses, 2, losses)
    assert taus == other
    assert taus[:12] == [6] * 12
    assert first_loss == pytest.approx(sum(4.0 * 0.9**step for step in range(7, 13)) / 6)
    assert taus[-1] < 4
    assert sum("AdaComm was told" in text for text in heard) == 1
    assert not any("AdaComm" in text for text in silent)
