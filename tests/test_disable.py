"""Pins disable(): from the next step on plain DDP, from the consensus model."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.cases import ALGORITHMS, Case, with_tau
from tests.collectives import counted_collectives
from tests.expected import assert_plain_ddp_follows
from tests.harness import run_ranks
from tests.training import Form, Trainer
from tests.workload import plain_sgd


def disabled(cases: Sequence[Case], form: Form) -> list[tuple[list[Tensor], Tensor, Tensor]]:
    return [disabled_in_the_middle(case, form) for case in cases]


def disabled_in_the_middle(case: Case, form: Form) -> tuple[list[Tensor], Tensor, Tensor]:
    """Every step, the consensus inside a block at the end, and the model after `finish`."""
    trainer = Trainer(case, form)
    steps = [trainer.step() for _ in range(4)]
    trainer.state.disable()
    steps += [trainer.step() for _ in range(4, case.steps)]
    with trainer.state.averaged():
        inside = trainer.x
    trainer.state.finish()
    return steps, inside, trainer.x


@pytest.mark.parametrize("form", ["register", "hook"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_disable_goes_on_as_plain_ddp(algorithm: str, form: Form) -> None:
    """Momentum stays each rank's own, so the ranks drift apart and the consensus is a mean."""
    cases = [
        Case(algorithm, arguments, dtype=torch.float64, steps=9)
        for arguments in with_tau(algorithm, 3)
    ]
    for case, *ranks in zip(cases, *run_ranks(disabled, 2, cases, form), strict=True):
        assert_plain_ddp_follows(case, ranks, disabled_after=4)


def rounds_after_disable(case: Case) -> tuple[int, int, int]:
    trainer = Trainer(case)
    for _ in range(5):
        trainer.step()
    trainer.state.disable()
    before = trainer.state.stats
    with counted_collectives() as collectives:
        for _ in range(6):
            trainer.step()
    after = trainer.state.stats
    launched = after.rounds_launched - before.rounds_launched
    return launched, after.rounds_launched - after.rounds_completed, collectives["commhooks"]


def test_no_round_is_launched_after_disable() -> None:
    case = Case("OverlapLocalSGD", {"tau": 2}, optimizers=plain_sgd, ddp={"bucket_cap_mb": 25})
    # In each of the six steps the gradients, and what the ranks must agree on to send them.
    assert run_ranks(rounds_after_disable, 2, case) == [(0, 0, 6 * 2)] * 2
