"""Pins that ranks in islands which do different things all get a RoundError, and never wait.

A rank meets its island at every step, and the other islands only now and then: one that makes a
call of its own must not wait for the others where they do not come.
"""

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import commhooks
from tests.cases import Case, one_case
from tests.disagreement.teams import Game, Survived, played
from tests.disagreement.test_mismatched_calls import mismatched
from tests.harness import Outcome, RankDied, rank_outcomes
from tests.optimizers.test_changes import partly_frozen, unfreeze
from tests.signals import Signals
from tests.training import Trainer
from tests.workload import plain_sgd

WARM = Case("OverlapLocalSGD", {"tau": 2}, warmup_steps=50, island=2)
CONTROL = Case("AllReduce", island=2)
BLOCKING = Case("LocalSGD", {"tau": 2}, island=2)
OVERLAPPED = Case("EASGD", {"tau": 2}, island=2)
STREAMING = Case("DiLoCo", {"tau": 4, "fragments": 2, "delay": 3}, island=2)
"""With two rounds in flight after steps 4, 5, 8 and 9."""

ONE_RANK = [
    Game(BLOCKING, 3, ("averaged", "train", "train", "train")),
    Game(OVERLAPPED, 4, ("train", "finish", "train", "train")),
    Game(STREAMING, 4, ("train", "train", "train", "averaged")),
    Game(STREAMING, 5, ("train", "disable", "train", "train")),
    Game(BLOCKING, 3, ("train", "close", "train", "train")),
    Game(OVERLAPPED, 4, ("train", "train", "close", "train")),
]
WHERE_ALL_RANKS_AVERAGE_GRADIENTS = [
    Game(WARM, 3, ("averaged", "train", "train", "train")),
    Game(WARM, 3, ("train", "train", "train", "finish")),
    Game(CONTROL, 2, ("train", "averaged", "train", "train")),
    Game(CONTROL, 3, ("averaged", "averaged", "train", "train")),
    # The step after this one is the first local one.
    Game(replace(WARM, warmup_steps=3), 3, ("train", "averaged", "train", "train")),
    Game(replace(WARM, warmup_steps=4), 3, ("train", "averaged", "train", "train")),
]
A_WHOLE_ISLAND = [
    Game(BLOCKING, 3, ("averaged", "averaged", "train", "train")),
    Game(OVERLAPPED, 4, ("train", "train", "drift", "drift")),
    Game(STREAMING, 4, ("averaged", "averaged", "train", "train")),
    Game(STREAMING, 5, ("train", "train", "averaged", "averaged")),
    Game(OVERLAPPED, 4, ("close", "close", "train", "train")),
    Game(BLOCKING, 4, ("averaged", "finish", "finish", "averaged")),
]


@pytest.mark.parametrize(
    "games",
    [ONE_RANK, WHERE_ALL_RANKS_AVERAGE_GRADIENTS, A_WHOLE_ISLAND],
    ids=["rank", "gradients", "island"],
)
def test_every_rank_of_both_islands_is_told(games: list[Game]) -> None:
    for game, team in played(mismatched, games):
        for outcome in team:
            assert outcome.error is None, f"{game}:\n{outcome.describe()}"
            assert "not at the same point" in str(outcome.value), f"{game}: {outcome.value}"


def replaced(trainer: Trainer) -> None:
    """``load_state_dict(assign=True)``: DDP and the optimizer still have the old parameters."""
    values = {name: value.clone() for name, value in trainer.model.module.state_dict().items()}
    trainer.model.module.load_state_dict(values, assign=True)


def turned(trainer: Trainer) -> None:
    """The same numbers in another order in memory."""
    first = trainer.model.module.get_submodule("0")
    assert isinstance(first, nn.Linear)
    with torch.no_grad():
        first.weight.data = first.weight.T.contiguous().T


def goes_on(trainer: Trainer, game: Game, call: str) -> str:
    """What is raised in the steps after a change, or by the call that ends them."""
    changes = {"replaced": replaced, "unfrozen": unfreeze, "turned": turned}
    what, _, when = call.partition(" ")
    if not when and what in changes:
        changes[what](trainer)
    try:
        for _ in range(3 * trainer.case.tau):
            trainer.steps += 1
            trainer.backward()
            if when and trainer.steps == game.steps + 1:
                changes[what](trainer)
            trainer.optimize()
        trainer.state.finish()
    except commhooks.RoundError as error:
        assert trainer.state.stats.rounds_launched >= trainer.state.stats.rounds_completed
        with pytest.raises(commhooks.RoundError):
            trainer.state.finish()
        return str(error)
    raise Survived


def after(call: str, cases: Sequence[Case], steps: Sequence[int]) -> Iterator[Game]:
    """One rank makes a change after so many steps: now one of the first island, now another."""
    for number, (case, step) in enumerate(zip(cases, steps, strict=True)):
        calls = ["train"] * 4
        calls[number % 4] = call
        yield Game(case, step, tuple(calls))


CASES = [
    BLOCKING,
    OVERLAPPED,
    STREAMING,
    one_case("OverlapLocalSGD", 3, island=2),
    one_case("CoCoDSGD", 2, island=2),
    one_case("SlowMo", 2, island=2),
]


def assert_all_say(game: Game, team: Sequence[Outcome[str]], words: str) -> None:
    for outcome in team:
        assert outcome.error is None, f"{game}:\n{outcome.describe()}"
        assert words in str(outcome.value), f"{game}: {outcome.value}"


def test_a_parameter_replaced_on_one_rank() -> None:
    """Its backwards are no steps any more, so that the others wait until it makes a call."""
    for game, team in played(goes_on, list(after("replaced", CASES, (3, 4, 4, 4, 3, 3)))):
        assert_all_say(game, team, "not at the same point")


def test_a_parameter_replaced_right_before_a_launch() -> None:
    games = list(after("replaced in the step", CASES, (3, 3, 3, 5, 3, 3)))
    for game, team in played(goes_on, games):
        assert_all_say(game, team, "")
        # Its mate may have heard of it in the next step already, and no more than that.
        mate = game.calls.index("replaced in the step") ^ 1
        told = [outcome for number, outcome in enumerate(team) if number != mate]
        assert_all_say(game, told, "'0.weight' has been replaced")


def test_a_layer_unfrozen_on_one_rank() -> None:
    cases = [replace(case, model=partly_frozen, optimizers=plain_sgd) for case in CASES]
    for game, team in played(goes_on, list(after("unfrozen", cases, (3, 4, 4, 4, 3, 3)))):
        assert_all_say(game, team, "'0.weight' requires a gradient now")


def test_a_parameter_moved_between_launch_and_landing() -> None:
    """Found when the round lands, where the ranks of the other island may not be."""
    delayed = Case("DiLoCo", {"tau": 4, "delay": 2}, island=2)
    cases = [STREAMING, delayed, replace(STREAMING, arguments={**STREAMING.arguments, "delay": 1})]
    for game, team in played(goes_on, list(after("turned", cases, (4, 4, 4)))):
        assert_all_say(game, team, "")
        mine = 2 * (game.calls.index("turned") // 2)
        assert_all_say(game, team[mine : mine + 2], "changed its shape, strides")


def left_by_a_mate(case: Case, signals: Signals) -> None:
    """Rank 1 is killed in the middle of a run; the others end with what they get."""
    trainer = Trainer(case)
    for _ in range(3):
        trainer.step()
    if trainer.rank == 1:
        for rank in (0, 2, 3):
            signals.await_(f"rank {rank} is near")
        os.kill(os.getpid(), signal.SIGKILL)
    signals.give(f"rank {trainer.rank} is near")
    for _ in range(4 * case.tau):
        try:
            trainer.step()
        except commhooks.RoundError:
            before = trainer.x
            with pytest.raises(commhooks.RoundError), trainer.state.averaged():
                pass
            assert torch.equal(trainer.x, before)
            raise
    raise Survived


@pytest.mark.parametrize("case", [BLOCKING, OVERLAPPED, STREAMING, WARM], ids=str)
def test_a_dead_rank_ends_its_island_and_the_others(case: Case, tmp_path: Path) -> None:
    outcomes = rank_outcomes(
        left_by_a_mate, 4, case, Signals(tmp_path), timeout=15.0, group_timeout=600.0
    )
    assert isinstance(outcomes[1].error, RankDied), outcomes[1].describe()
    for outcome in (outcomes[0], *outcomes[2:]):
        assert isinstance(outcome.error, commhooks.RoundError), outcome.describe()
