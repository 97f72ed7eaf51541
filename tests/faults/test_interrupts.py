"""Pins that Ctrl-C, caught by the loop at whatever moment, loses and mixes nothing."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
from torch import Tensor

from commhooks.engine.network.communicator import Communicator
from commhooks.engine.rounds.round import Round
from tests.cases import PERIODIC, Case, with_tau
from tests.expected import assert_follows, reference_trajectory
from tests.harness import run_ranks
from tests.training import Trainer


@contextmanager
def interrupted_once(owner: type, method: str) -> Iterator[None]:
    """SIGINT for this process in the first call of ``method``, before it does anything."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has none
    original = getattr(owner, method)

    def interrupted(*args: object, **kwargs: object) -> object:
        setattr(owner, method, original)
        signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    setattr(owner, method, interrupted)
    try:
        yield
    finally:
        setattr(owner, method, original)


def interrupted_runs(cases: Sequence[Case], moment: str) -> list[list[Tensor]]:
    """The parameters after every step; after an interrupt, the loop saves and goes on."""
    runs = []
    for case in cases:
        trainer = Trainer(case)
        owner, method = {
            "waiting": (Round, "wait"),
            "mixing": (type(trainer.state), "mix"),
            "launching": (Communicator, "all_reduce"),
        }[moment]
        # In the first local step the ranks meet inside the backward, for which nothing makes up.
        steps, interrupts = [trainer.step()], 0
        for _ in range(case.steps - 1):
            with interrupted_once(owner, method):
                try:
                    trainer.step()
                except KeyboardInterrupt:
                    interrupts += 1
                    for optimizer in trainer.optimizers:
                        optimizer.zero_grad()
                    trainer.state.state_dict()
            steps.append(trainer.x)
        assert interrupts > 1, (case.algorithm, interrupts)
        runs.append(steps)
    return runs


@pytest.mark.parametrize("moment", ["waiting", "mixing", "launching"])
def test_caught_at_every_boundary(moment: str) -> None:
    cases = [Case(name, next(with_tau(name, 2)), steps=8) for name in PERIODIC]
    for case, *real in zip(cases, *run_ranks(interrupted_runs, 2, cases, moment), strict=True):
        assert_follows(case, real, reference_trajectory(case, 2))


def interrupted_and_trained_on(cases: Sequence[Case]) -> list[list[Tensor]]:
    """The wait of every boundary is cut short on rank 0 alone, and the loop just goes on."""
    runs = []
    for case in cases:
        trainer = Trainer(case)
        steps = []
        for _ in range(case.steps):
            trainer.model(trainer_input(trainer))
            steps.append(trainer.x)
            with interrupted_once(Round, "wait"):
                try:
                    trainer.step()
                except KeyboardInterrupt:
                    for optimizer in trainer.optimizers:
                        optimizer.zero_grad()
        runs.append(steps)
    return runs


def trainer_input(trainer: Trainer) -> Tensor:
    return next(trainer.model.parameters()).new_zeros(1, 5)


def test_the_next_forward_makes_up_for_an_interrupted_wait() -> None:
    cases = [Case(name, next(with_tau(name, 2)), steps=8) for name in ("LocalSGD", "BMUF")]
    for case, *real in zip(cases, *run_ranks(interrupted_and_trained_on, 2, cases), strict=True):
        expected = reference_trajectory(case, 2)
        assert_follows(case, [steps[1:] for steps in real], expected[:-1])
