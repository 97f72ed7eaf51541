"""Pins that overlapped rounds are in flight while steps run, that blocking ones are not, and that
nothing else waits for the other ranks.

No timing: rank 1 stands still before its boundary until rank 0 says that it is steps ahead. Were
rank 0 to wait for it anywhere, neither would move again.
"""

import threading
from pathlib import Path
from typing import Any

import pytest

import commhooks
from tests.cases import BLOCKING, OVERLAPPED, Case, one_case
from tests.harness import run_ranks
from tests.signals import Signals
from tests.training import Trainer
from tests.workload import TINY_CAP_MB

TAU = 5


def lead_of_rank_zero(case: Case, signals: Signals, last: int) -> list[tuple[int, int]]:
    """Rank 1 stands still before step TAU until rank 0 has made step ``last``.

    Rounds launched and completed after every step. The first two steps are in lockstep, since
    DDP agrees on its gradient buckets in the second.
    """
    trainer = Trainer(case)
    seen = []
    for step in range(1, 3 * TAU + 1):
        if trainer.rank == 1 and step == TAU:
            signals.await_("rank 0 is ahead")
        trainer.step()
        stats = trainer.state.stats
        seen.append((stats.rounds_launched, stats.rounds_completed))
        if trainer.rank == 0 and step == last:
            signals.give("rank 0 is ahead")
    trainer.state.finish()
    return seen


@pytest.mark.parametrize("algorithm", OVERLAPPED)
def test_an_overlapped_round_is_in_flight_while_steps_run(algorithm: str, tmp_path: Path) -> None:
    """Rank 0 runs every step up to its next boundary, with the first round still under way."""
    first, _ = run_ranks(
        lead_of_rank_zero,
        2,
        one_case(algorithm, TAU),
        Signals(tmp_path),
        2 * TAU - 1,
        group_timeout=600,
    )
    assert first[TAU - 2] == (0, 0)
    assert first[TAU - 1 : 2 * TAU - 1] == [(1, 0)] * TAU  # launched, and not completed yet
    launched, completed = first[2 * TAU - 1]
    assert (launched, completed >= 1) == (2, True)  # waited for at its own boundary


@pytest.mark.parametrize("algorithm", OVERLAPPED)
def test_an_overlapped_round_is_waited_for_at_the_next_boundary(
    algorithm: str, tmp_path: Path
) -> None:
    """Rank 0 does not get past its second boundary while rank 1 has not reached the first."""
    reached = run_ranks(past_second_boundary, 2, one_case(algorithm, TAU), Signals(tmp_path))
    assert reached == [True, True]


def past_second_boundary(case: Case, signals: Signals) -> bool:
    """Whether rank 1 had reached its first boundary when rank 0 came out of its second."""
    trainer = Trainer(case)
    for step in range(1, 2 * TAU + 1):
        if trainer.rank == 1 and step == TAU:
            signals.await_("rank 0 is at its second boundary")
            signals.give("rank 1 is at its first boundary")
        if trainer.rank == 0 and step == 2 * TAU:
            signals.give("rank 0 is at its second boundary")
        trainer.step()
    return signals.given("rank 1 is at its first boundary")


def past_first_boundary(case: Case, signals: Signals) -> bool:
    """Whether rank 1 had reached the boundary when rank 0 came out of it."""
    trainer = Trainer(case)
    for step in range(1, TAU + 1):
        if trainer.rank == 1 and step == TAU:
            signals.await_("rank 0 is at the boundary")
            signals.give("rank 1 is at the boundary")
        if trainer.rank == 0 and step == TAU:
            signals.give("rank 0 is at the boundary")
        trainer.step()
    stats = trainer.state.stats
    assert stats.rounds_launched == stats.rounds_completed == 1
    return signals.given("rank 1 is at the boundary")


@pytest.mark.parametrize("algorithm", BLOCKING)
def test_a_blocking_round_ends_at_its_boundary(algorithm: str, tmp_path: Path) -> None:
    assert run_ranks(past_first_boundary, 2, one_case(algorithm, TAU), Signals(tmp_path)) == [
        True,
        True,
    ]


class NotesThreads(commhooks.OverlapLocalSGD):
    """Overlap-Local-SGD that remembers where its chained updates ran."""

    threads: list[int]

    def chain(self, *args: Any, **kwargs: Any) -> None:
        self.threads.append(threading.get_ident())
        super().chain(*args, **kwargs)


def chain_threads(signals: Signals) -> tuple[list[int], int]:
    """The threads that the chained updates of the first round ran on, and the training thread."""
    state = NotesThreads(tau=TAU, beta=0.5, bucket_cap_mb=TINY_CAP_MB)
    state.threads = []
    trainer = Trainer(one_case("OverlapLocalSGD", TAU), state=state)
    for step in range(1, 2 * TAU):
        if trainer.rank == 1 and step == TAU:
            signals.await_("rank 0 is ahead")
        trainer.step()
        if trainer.rank == 0 and step == TAU + 1:
            assert state.threads == []
            signals.give("rank 0 is ahead")
    state.finish()
    return state.threads, threading.get_ident()


def test_the_chained_update_runs_off_the_training_thread(tmp_path: Path) -> None:
    first, _ = run_ranks(chain_threads, 2, Signals(tmp_path))
    threads, training_thread = first
    assert len(threads) > 1  # several buckets
    assert training_thread not in threads
