"""Pins that ranks which wait for one another in different groups are all told who waits where.

Each waited for the timeout of its group, half an hour by default, and then learnt nothing of the
others. Here that timeout is far away, so that a rank that waits for it is found stuck.
"""

import logging
import os
import threading
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

import commhooks
from commhooks.engine.network import waiting
from tests.cases import Case
from tests.disagreement.teams import Game, Survived, played
from tests.harness import Outcome, rank_outcomes, run_ranks
from tests.training import Trainer, make_state, wrapped

LOCAL = Case("LocalSGD", {"tau": 2})
EVERY_STEP = Case("BMUF", {"tau": 1})
OVERLAPPED = Case("OverlapLocalSGD", {"tau": 2})
ISLANDS = replace(LOCAL, island=2)
SYNCHRONOUS = Case("AllReduce")


def in_a_hurry() -> None:
    """Look for waits after two seconds, not ten, and say in the output what is logged."""
    waiting._PATIENCE_S, waiting._POLL_S, waiting._WORRIED_S = 2.0, 0.5, 3.0
    logging.basicConfig()


# Deadlocks. The calls of a game are what each rank does once all have made some steps.


def deadlocked(trainer: Trainer, game: Game, call: str) -> str:
    in_a_hurry()
    group = trainer.state.join_process_group
    others = replace(EVERY_STEP, ddp={"process_group": group})
    other = Trainer(
        replace(SYNCHRONOUS, ddp={"process_group": group}) if "warm" in call else others
    )
    other.rank = trainer.rank
    plain = wrapped(LOCAL.model(LOCAL.dtype), process_group=group)
    for _ in range(2):
        LOCAL.backward(plain, trainer.rank, 1)
    state = trainer.state
    # A rank that comes much later than the others is not yet in what they hear of.
    dist.barrier()
    if call.startswith("skips a step"):
        other.step()
    elif call == "barrier":
        dist.barrier(group)
    elif call == "gathers its loss":
        dist.all_reduce(torch.ones(1), group=group)
    elif call == "gathers objects":
        dist.all_gather_object([None] * dist.get_world_size(group), "this", group=group)
    elif call == "hears of the first rank":
        dist.broadcast(torch.ones(1), group_src=0, group=group)
    elif call == "trains a plain model":
        LOCAL.backward(plain, trainer.rank, 1)
    elif call == "finishes another":
        other.state.finish()
    elif call in ("finish", "drift"):
        getattr(state, call)()
    elif call == "averaged":
        with state.averaged():
            pass
    for _ in range(2):
        trainer.step()
        other.step()
    raise Survived


GAMES = [
    Game(LOCAL, 3, ("skips a step", "steps")),
    Game(LOCAL, 3, ("skips a step in warm-up", "steps in warm-up")),
    Game(LOCAL, 2, ("finish", "barrier")),
    Game(OVERLAPPED, 3, ("gathers its loss", "finish")),
    Game(OVERLAPPED, 5, ("finish", "gathers objects")),
    Game(LOCAL, 3, ("averaged", "hears of the first rank")),
    Game(LOCAL, 3, ("drift", "finishes another")),
    Game(LOCAL, 3, ("averaged", "trains a plain model")),
    Game(LOCAL, 3, ("finish", "finishes another", "barrier")),
    Game(ISLANDS, 3, ("finish", "finish", "finish", "barrier")),
    Game(ISLANDS, 3, ("finishes another", "finish", "finish", "finish")),
]
IN_TORCH = {
    "barrier",
    "gathers its loss",
    "gathers objects",
    "hears of the first rank",
    "trains a plain model",
}


@pytest.mark.parametrize("games", [GAMES[:4], GAMES[4:8], GAMES[8:]], ids=["one", "two", "three"])
def test_every_rank_is_told_who_waits_where(games: list[Game]) -> None:
    for game, team in played(deadlocked, games):
        for call, outcome in zip(game.calls, team, strict=True):
            if call in IN_TORCH:
                # Nothing ends torch's own wait but that the others leave.
                assert type(outcome.error) is RuntimeError, f"{game}:\n{outcome.describe()}"
                told = outcome.output
            else:
                assert isinstance(outcome.error, commhooks.RoundError), (
                    f"{game}:\n{outcome.describe()}"
                )
                told = str(outcome.error)
            assert "ranks wait for one another" in told, f"{game}:\n{outcome.describe()}"
            assert f"rank {outcome.rank} is in" in told, told
            assert all(f"rank {member.rank} is in" in told for member in team), told


def deadlocked_over_tcp() -> None:
    """Rank 0 has the store, and its process ends at the error."""
    in_a_hurry()
    rank = dist.get_rank()
    held = (
        TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False) if rank == 0 else None
    )
    port = [held.port if held is not None else 0]
    dist.broadcast_object_list(port)
    store = held or TCPStore("127.0.0.1", port[0], 2)
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    trainer = Trainer(LOCAL)
    trainer.step()
    if rank == 1:
        dist.barrier()
    trainer.state.finish()


def test_over_a_store_that_a_rank_holds() -> None:
    first, second = rank_outcomes(deadlocked_over_tcp, 2, timeout=30.0, group_timeout=600.0)
    assert isinstance(first.error, commhooks.RoundError), first.describe()
    assert "rank 1 is in torch's barrier()" in str(first.error)
    assert "rank 0 is in finish() after step 1" in second.output


# Ranks that are late, and no more than that.


def late() -> str:
    in_a_hurry()
    trainer = Trainer(LOCAL)
    for step in range(4):
        if trainer.rank == 2 and step == 3:
            time.sleep(8.0)
        trainer.step()
    if trainer.rank == 1:
        time.sleep(8.0)
    trainer.state.finish()
    return "went on"


def test_a_rank_that_computes_is_waited_for() -> None:
    for outcome in rank_outcomes(late, 3, timeout=60.0, group_timeout=600.0):
        assert outcome.value == "went on", outcome.describe()
        if outcome.rank == 0:
            assert "rank 0 is in round 2 after step 4" in outcome.output
            assert "for rank 2, which is at test_waits.py" in outcome.output
            assert "for rank 1, which is at test_waits.py" in outcome.output
            assert "for ever" not in outcome.output


def another_thread_comes() -> str:
    """The main threads wait for one another, and a thread of rank 1 frees rank 0."""
    in_a_hurry()
    group = dist.new_group()
    trainer = Trainer(LOCAL)
    trainer.step()

    def helper() -> None:
        dist.barrier(group)
        time.sleep(8.0)
        dist.barrier(group)

    if trainer.rank == 1:
        threading.Thread(target=helper).start()
    else:
        dist.barrier(group)
        dist.barrier(group)
    trainer.state.finish()
    return "went on"


def test_a_rank_that_another_thread_frees_is_waited_for() -> None:
    assert run_ranks(another_thread_comes, 2, timeout=60.0, group_timeout=600.0) == ["went on"] * 2


# Registration.


def registers_alone(meanwhile: str) -> str:
    in_a_hurry()
    model = wrapped(LOCAL.model(LOCAL.dtype))
    state = make_state(LOCAL)
    if dist.get_rank() == 0:
        state.register(model, *LOCAL.optimizers(model))
    elif meanwhile == "trains":
        for step in range(3):
            LOCAL.backward(model, 1, step)
    else:
        # Something has to run before: a state that is not registered sees forwards alone.
        model(torch.ones(1, 5))
        dist.barrier()
    return "went on"


@pytest.mark.parametrize(("meanwhile", "seen"), [("trains", "backward"), ("waits", "barrier")])
def test_register_on_one_rank_alone(meanwhile: str, seen: str) -> None:
    """The two collectives are of one group and have one number there, and never meet."""
    first, second = rank_outcomes(registers_alone, 2, meanwhile, timeout=30.0, group_timeout=600.0)
    assert isinstance(first.error, commhooks.RegistrationError), first.describe()
    assert "rank 0 is in register(), called at test_waits.py" in str(first.error)
    assert f"rank 1 is in torch's {seen}(), called at" in str(first.error)
    assert type(second.error) is RuntimeError, second.describe()
    assert "rank 0 is in register(), called at test_waits.py" in second.output


def registers_late() -> str:
    in_a_hurry()
    model = wrapped(LOCAL.model(LOCAL.dtype))
    if dist.get_rank() == 1:
        time.sleep(8.0)
    state = make_state(LOCAL)
    state.register(model, *LOCAL.optimizers(model))
    return "went on"


def test_a_rank_that_registers_late_is_waited_for() -> None:
    outcomes = rank_outcomes(registers_late, 2, timeout=30.0, group_timeout=600.0)
    assert [outcome.value for outcome in outcomes] == ["went on"] * 2
    assert "rank 1, which has not answered, and may have registered no state" in outcomes[0].output


# Ranks that have left.


def left_alone(call: str) -> str:
    trainer = Trainer(LOCAL)
    for _ in range(3):
        trainer.step()
    if call == "close":
        trainer.state.finish()
    dist.barrier()
    if trainer.rank == 1:
        os._exit(0)
    try:
        if call == "averaged":
            with trainer.state.averaged():
                pass
        elif call == "register":
            make_state(LOCAL).register(trainer.model, *trainer.optimizers)
        elif call == "step":
            trainer.step()
        else:
            getattr(trainer.state, call)()
    except commhooks.CommHooksError as error:
        return f"{type(error).__name__}: {error}"
    raise Survived


@pytest.mark.parametrize("call", ["finish", "averaged", "drift", "close", "step", "register"])
def test_a_rank_that_has_left_is_told_of_in_plain_words(call: str) -> None:
    alone: Outcome[str] = rank_outcomes(left_alone, 2, call, timeout=30.0, group_timeout=600.0)[0]
    assert alone.value is not None, alone.describe()
    kind = "RegistrationError" if call == "register" else "RoundError"
    assert alone.value.startswith(kind)
    assert "another rank has left: its process has ended or crashed" in alone.value
    assert "callback" not in alone.value
    if call not in ("step", "register"):
        assert f"{call}(): another rank" in alone.value
