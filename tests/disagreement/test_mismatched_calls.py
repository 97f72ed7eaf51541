"""Pins that ranks which make different calls all get a RoundError that says so.

Collectives of different sizes met in the backend, which then aborts the process, or a rank waited
for the group's timeout.
"""

import pytest

import commhooks
from tests.cases import Case
from tests.disagreement.teams import Game, Survived, played
from tests.training import Trainer

WARM = Case("OverlapLocalSGD", {"tau": 2}, warmup_steps=50)
BLOCKING = Case("LocalSGD", {"tau": 2})
OVERLAPPED = Case("EASGD", {"tau": 2})
STREAMING = Case("DiLoCo", {"tau": 4, "fragments": 2, "delay": 3})
"""With two rounds in flight after steps 4, 5, 8 and 9."""

# DDP exchanges its buckets' layout in the second forward, so every game is past it.
WITH_A_STEP = [
    Game(WARM, 3, ("averaged", "train")),
    Game(WARM, 2, ("train", "finish")),
    Game(WARM, 3, ("disable", "train")),
    Game(Case("AllReduce"), 3, ("averaged", "train")),
    Game(Case("AllReduce"), 2, ("train", "finish")),
    Game(BLOCKING, 3, ("averaged", "train")),
    Game(OVERLAPPED, 3, ("train", "averaged")),
    Game(Case("CoCoDSGD", {"tau": 3}), 4, ("disable", "train")),
    Game(Case("BMUF", {"tau": 2}), 4, ("drift", "train")),
    Game(STREAMING, 4, ("train", "averaged")),
    Game(STREAMING, 5, ("averaged", "train")),
]
BETWEEN_CALLS = [
    Game(WARM, 3, ("averaged", "disable")),
    Game(Case("AllReduce"), 2, ("finish", "averaged")),
    Game(BLOCKING, 4, ("averaged", "finish")),
    Game(BLOCKING, 3, ("disable", "averaged")),
    Game(OVERLAPPED, 4, ("disable", "finish")),
    Game(OVERLAPPED, 5, ("averaged", "finish")),
    Game(Case("OverlapLocalSGD", {"tau": 3}), 5, ("averaged", "averaged", "finish")),
    Game(BLOCKING, 3, ("averaged", "train", "finish")),
    Game(STREAMING, 4, ("averaged", "finish")),
]
WITH_CLOSE = [
    Game(BLOCKING, 3, ("close", "train")),
    Game(OVERLAPPED, 4, ("averaged", "close")),
    Game(WARM, 3, ("close", "finish")),
    Game(STREAMING, 4, ("train", "close")),
]


def mismatched(trainer: Trainer, game: Game, call: str) -> str:
    """What is raised, at the call itself or, at the latest, in the training that goes on."""
    if "close" in game.calls:
        trainer.state.finish()
    try:
        if call == "averaged":
            with trainer.state.averaged():
                pass
        elif call != "train":
            getattr(trainer.state, call)()
        for _ in range(4 * trainer.case.tau):
            trainer.step()
        trainer.state.finish()
    except commhooks.RoundError as error:
        return str(error)
    raise Survived


@pytest.mark.parametrize(
    "games", [WITH_A_STEP, BETWEEN_CALLS, WITH_CLOSE], ids=["step", "calls", "close"]
)
def test_every_rank_is_told(games: list[Game]) -> None:
    for game, team in played(mismatched, games):
        for outcome in team:
            assert outcome.error is None, f"{game}:\n{outcome.describe()}"
            assert "not at the same point" in str(outcome.value), f"{game}: {outcome.value}"
