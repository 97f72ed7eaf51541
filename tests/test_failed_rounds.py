"""Pins that a failed round raises RoundError and leaves what the optimizer last wrote."""

import copy
import os
import pickle
import signal
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import commhooks
from tests.cases import BLOCKING, PERIODIC, Case, one_case
from tests.harness import RankDied, rank_outcomes, run_ranks
from tests.reference import flat, write
from tests.signals import Signals
from tests.training import Trainer

TAU = 3


class Survived(Exception):
    """No error where one had to be."""


class Failure(NamedTuple):
    """What rank 0 raised, and whether its parameters are what its optimizer last wrote."""

    error: commhooks.RoundError
    as_written: bool
    again: bool


def survive_a_killed_peer(case: Case, signals: Signals) -> Failure:
    """Rank 1 is killed before it joins the second round."""
    trainer = Trainer(case)
    alone = case.model(case.dtype)
    (optimizer,) = case.optimizers(alone)
    for step in range(1, 4 * TAU):
        if step == 2 * TAU:
            trainer.state.state_dict()  # the first round is over on both
        if trainer.rank == 1 and step == 2 * TAU:
            signals.await_("rank 0 is near")
            os.kill(os.getpid(), signal.SIGKILL)
        if trainer.rank == 0 and step == 2 * TAU:
            signals.give("rank 0 is near")
        # The same step by a twin of the model and the optimizer that nobody averages.
        write(trainer.x, alone.parameters())
        optimizer.load_state_dict(copy.deepcopy(trainer.optimizers[0].state_dict()))
        alone.zero_grad()
        case.backward(alone, trainer.rank, step)
        optimizer.step()
        try:
            trainer.step()
        except commhooks.RoundError as error:
            return Failure(error, torch.equal(trainer.x, flat(alone.parameters())), again(trainer))
    raise Survived


def again(trainer: Trainer) -> bool:
    """Whether everything collective goes on to raise, and nothing changes the parameters."""
    before = trainer.x
    for use in (trainer.state.finish, trainer.state.averaged().__enter__, trainer.step):
        with pytest.raises(commhooks.RoundError):
            use()
    return torch.equal(trainer.x, before)


@pytest.mark.parametrize("algorithm", PERIODIC)
def test_a_dead_peer(algorithm: str, tmp_path: Path) -> None:
    """Blocking rounds fail at their own boundary, overlapped ones at the next, both by name."""
    case = one_case(algorithm, TAU)
    survivor, killed = rank_outcomes(survive_a_killed_peer, 2, case, Signals(tmp_path))
    assert isinstance(killed.error, RankDied)
    assert survivor.value is not None, survivor.describe()
    error, as_written, again = survivor.value
    assert as_written
    assert again
    assert (error.algorithm, error.round, error.ranks) == (algorithm, 2, (0, 1)), str(error)
    assert error.step == (2 * TAU if algorithm in BLOCKING else 3 * TAU)
    for part in (algorithm, "round 2", f"step {error.step}", "[0, 1]", error.cause):
        assert part in str(error)


def test_the_error_pickles() -> None:
    error = commhooks.RoundError("EASGD", 3, 7, (0, 1), "Connection closed by peer.")
    twin = pickle.loads(pickle.dumps(error))
    assert str(twin) == str(error)
    assert vars(twin) == vars(error)


def rule_that_fails(case: Case, signals: Signals) -> str:
    """Rank 1's own rule raises from the second or third round on; nobody's process ends for it."""
    trainer = Trainer(case)
    if trainer.rank == 1:
        rules = type(trainer.state)
        honest = rules.chain

        def chain(state: commhooks.CommHookState, **vectors: torch.Tensor) -> None:
            if state.stats.rounds_launched >= 2:
                raise ArithmeticError("the rule has failed")
            honest(state, **vectors)

        rules.chain = chain  # type: ignore[assignment, method-assign]
    try:
        for _ in range(5 * TAU):
            trainer.step()
    except commhooks.RoundError as error:
        signals.give(f"rank {trainer.rank} has it")
        for rank in range(torch.distributed.get_world_size()):
            signals.await_(f"rank {rank} has it", patience=60.0)
        return str(error)
    raise Survived


@pytest.mark.parametrize("algorithm", PERIODIC)
@pytest.mark.parametrize("island", [1, 2])
def test_a_rule_that_fails_on_one_rank_is_an_error_on_all(
    algorithm: str, island: int, tmp_path: Path
) -> None:
    case = one_case(algorithm, TAU, island=island)
    said = run_ranks(rule_that_fails, 2 * island, case, Signals(tmp_path))
    assert "the rule has failed" in said.pop(1)
    for other in said:
        assert "rank 1 at an error in its island" in other
