"""Pins what loops do in between, while rounds of several fragments are in flight."""

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join

import commhooks
from tests.cases import Case
from tests.diloco.family import streaming
from tests.expected import (
    assert_close,
    assert_follows,
    assert_plain_ddp_follows,
    assert_ranks_follow,
    assert_shadowed,
    reference_trajectory,
    reference_workers,
)
from tests.faults.test_steps import talk, uneven
from tests.harness import RankDied, rank_outcomes, run_ranks
from tests.signals import Signals
from tests.test_consensus import averaged_at_every_step
from tests.test_disable import disabled
from tests.training import Form, Trainer
from tests.works_with.test_amp import OVERFLOWS

# The order of collectives.


class SlowInTurn(Trainer):
    """Ranks stand still before their steps, each at others; so each is ahead and behind in turn."""

    def backward(self) -> None:
        if (self.steps + self.rank) % 3 == 0:
            time.sleep(0.03)
        super().backward()

    def optimize(self) -> None:
        if (self.steps + 2 * self.rank) % 4 == 0:
            time.sleep(0.03)
        super().optimize()


def slow_in_turn(cases: Sequence[Case]) -> list[list[Tensor]]:
    return [[t.step() for _ in range(t.case.steps)] for t in map(SlowInTurn, cases)]


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_that_are_slow_in_turn(size: int) -> None:
    todo = streaming(steps=18)
    assert_ranks_follow(todo, run_ranks(slow_in_turn, size, todo))


def far_ahead(case: Case, signals: Signals) -> list[tuple[int, int]]:
    """Rank 1 stands still before its first launch until rank 0 has launched three rounds."""
    trainer = Trainer(case)
    seen = []
    for step in range(1, case.steps + 1):
        if trainer.rank == 1 and step == 3:
            signals.await_("rank 0 has launched three")
        trainer.step()
        stats = trainer.state.stats
        seen.append((stats.rounds_launched, stats.rounds_completed))
        if stats.rounds_launched == 3 and trainer.rank == 0:
            signals.give("rank 0 has launched three")
    trainer.state.finish()
    return seen


def test_a_rank_goes_on_with_all_fragments_in_flight(tmp_path: Path) -> None:
    """Launched after steps 3, 6 and 9 and landing 9 later: nothing is waited for until step 12."""
    arguments = {"tau": 9, "fragments": 3, "delay": 9}
    case = streaming(steps=14)[0]
    case = replace(case, arguments=arguments)
    first, second = run_ranks(far_ahead, 2, case, Signals(tmp_path), group_timeout=600)
    assert first[2:9] == [(1, 0), (1, 0), (1, 0), (2, 0), (2, 0), (2, 0), (3, 0)]
    assert second[-1][0] == first[-1][0] == 4


# averaged(), finish(), disable().


@pytest.mark.parametrize(("size", "form"), [(2, "hook"), (3, "register")])
def test_averaged_shows_the_mean_and_disturbs_nothing(size: int, form: Form) -> None:
    todo = streaming(warmup_steps=2)
    ranks = run_ranks(averaged_at_every_step, size, todo, form)
    for case, *real in zip(todo, *ranks, strict=True):
        workers = reference_workers(case, size)
        for step in range(case.steps):
            x = workers.step(case.backward)
            for rank, seen in enumerate(each[step] for each in real):
                where = f"rank {rank}, step {step + 1}"
                assert_close(case, seen.mine, x[rank], where)
                assert_close(case, seen.inside, workers.consensus, f"consensus, {where}")
                assert torch.equal(seen.inside, real[0][step].inside), where
                assert seen.put_back, where


def finished_after(cases: Sequence[Case], after: Sequence[int], form: Form) -> list[list[Tensor]]:
    return [Trainer(case, form).finishing(after) for case in cases]


@pytest.mark.parametrize("form", ["register", "hook"])
def test_finish_starts_every_fragment_anew(form: Form) -> None:
    """z is the consensus then, momentum is gone, and launches are counted from there."""
    todo = streaming(warmup_steps=1, steps=20)
    after = [1, 6, 7, 13]
    for case, *real in zip(todo, *run_ranks(finished_after, 2, todo, after, form), strict=True):
        workers, expected = reference_workers(case, 2), []
        for step in range(1, case.steps + 1):
            expected.append(workers.step(case.backward))
            if step in after:
                expected.append([workers.finish()] * 2)
        assert_follows(case, real, expected)


@pytest.mark.parametrize("form", ["register", "hook"])
def test_disable_goes_on_as_plain_ddp(form: Form) -> None:
    todo = streaming(steps=9)
    for case, *ranks in zip(todo, *run_ranks(disabled, 2, todo, form), strict=True):
        assert_plain_ddp_follows(case, ranks, disabled_after=4)


def closed_and_registered_anew(cases: Sequence[Case]) -> list[list[Tensor]]:
    """With rounds in flight at finish(); the module then trains under a state of its own."""
    runs = []
    for case in cases:
        first = Trainer(case)
        for _ in range(7):
            first.step()
        first.state.finish()
        first.state.close()
        again = Trainer(replace(case, model=partial(_as_it_is, first.model.module)))
        runs.append([again.step() for _ in range(9)])
    return runs


def _as_it_is(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    return module


def test_a_closed_state_leaves_nothing_behind() -> None:
    todo = streaming()
    for case, *real in zip(todo, *run_ranks(closed_and_registered_anew, 2, todo), strict=True):
        workers = reference_workers(case, 2)
        for _ in range(7):
            workers.step(case.backward)
        consensus = workers.finish()
        again = reference_workers(replace(case, steps=9), 2)
        for model, old in zip(again.models, workers.models, strict=True):
            model.load_state_dict(old.state_dict())
        again.algorithm.start([consensus] * 2, dict(again.models[0].named_parameters()))
        assert_follows(case, real, [again.step(case.backward) for _ in range(9)])


# Steps that are skipped or missing.


def test_skipped_steps() -> None:
    """Ranks skip different steps, those of launches and landings among them."""
    todo = streaming(dtype=torch.float32)
    skipped = {(rank, step) for rank, steps in OVERFLOWS.items() for step in steps}
    for case, *runs in zip(todo, *run_ranks(talk, 3, todo), strict=True):
        workers = reference_workers(case, 3)
        expected = [workers.step(case.backward, skipped) for _ in range(case.steps)]
        assert_follows(case, [x[:-1] for x, _ in runs], expected)
        assert {s.rounds_completed for _, s in runs} == {case.rounds(case.steps)}
        assert all(torch.equal(x[-1], runs[0][0][-1]) for x, _ in runs)


@pytest.mark.parametrize("lengths", [(9, 4, 6), (1, 7, 7), (0, 3, 8)])
def test_join_shadows_the_rounds_of_every_fragment(lengths: Sequence[int]) -> None:
    todo = [*streaming(), *streaming(ddp={"find_unused_parameters": True})]
    for case, *ends in zip(todo, *run_ranks(uneven, 3, todo, lengths), strict=True):
        assert_shadowed(case, ends, lengths)


def joined_twice(cases: Sequence[Case]) -> list[Tensor]:
    """A second context begins with rounds that no first one has left in flight."""
    ends = []
    for case in cases:
        trainer = Trainer(case)
        for lengths in ((5, 7), (6, 2)):
            with Join([trainer.state, trainer.model]):
                for _ in range(lengths[trainer.rank]):
                    trainer.step()
        ends.append(trainer.x)
    return ends


def test_join_twice() -> None:
    for one, other in zip(*run_ranks(joined_twice, 2, streaming()), strict=True):
        assert torch.equal(one, other)


# Failures.


def killed(case: Case, signals: Signals, last: int) -> tuple[commhooks.RoundError, bool, bool]:
    """Rank 1 dies before its step ``last``; what rank 0 raises, and whether x stays as it is."""
    trainer = Trainer(case)
    for step in range(1, case.steps + 1):
        if step == last:
            trainer.state.state_dict()  # all that was launched before is over on both
            if trainer.rank == 1:
                signals.await_("rank 0 is near")
                os.kill(os.getpid(), signal.SIGKILL)
            signals.give("rank 0 is near")
        twin = case.model(case.dtype)
        twin.load_state_dict(trainer.model.module.state_dict())
        try:
            trainer.step()
        except commhooks.RoundError as error:
            x = trainer.x
            again = []
            for use in (trainer.state.finish, trainer.state.averaged().__enter__, trainer.step):
                with pytest.raises(commhooks.RoundError):
                    use()
                again.append(torch.equal(trainer.x, x))
            return error, bool(torch.isfinite(x).all()), all(again)
    raise AssertionError("no error")


def test_a_dead_peer_with_several_fragments_in_flight(tmp_path: Path) -> None:
    for number, case in enumerate(streaming()):
        folder = tmp_path / str(number)
        folder.mkdir()
        survivor, dead = rank_outcomes(killed, 2, case, Signals(folder), 7)
        assert isinstance(dead.error, RankDied)
        assert survivor.value is not None, survivor.describe()
        error, finite, unchanged = survivor.value
        assert (error.algorithm, error.ranks) == ("DiLoCo", (0, 1))
        assert error.round > case.rounds(6), str(error)
        assert f"round {error.round}" in str(error)
        assert finite
        assert unchanged


def with_nan(case: Case, at: int) -> tuple[str, int, bool]:
    """Rank 1's parameters of the first layer become NaN in step ``at``."""
    trainer = Trainer(case)
    for step in range(1, case.steps + 1):
        if step == at and trainer.rank == 1:
            with torch.no_grad():
                next(trainer.model.parameters()).fill_(float("nan"))
        try:
            trainer.step()
        except commhooks.RoundError as error:
            return str(error), step, bool(torch.isfinite(trainer.x).all())
    raise AssertionError("no error")


def all_with_nan(cases: Sequence[Case], at: int) -> list[tuple[str, int, bool]]:
    return [with_nan(case, at) for case in cases]


def test_nan_on_one_rank_is_told_on_all() -> None:
    """At the landing of the first round that would spread it, and named; the others stay finite."""
    todo = streaming()
    for case, first, second in zip(todo, *run_ranks(all_with_nan, 2, todo, 6), strict=True):
        (message, step, finite), (other, other_step, other_finite) = first, second
        assert "the parameters of rank(s) [1] hold NaN" in message, (str(case), message)
        assert message == other
        assert step == other_step
        assert (finite, other_finite) == (True, False), str(case)


def test_one_worker_alone() -> None:
    """The outer optimizer still steps: it is DiLoCo with m = 1, a kind of Lookahead."""
    for case in streaming(warmup_steps=1):
        real = run_ranks(averaged_at_every_step, 1, [case], "register")
        assert_follows(case, [[seen.mine for seen in real[0][0]]], reference_trajectory(case, 1))
