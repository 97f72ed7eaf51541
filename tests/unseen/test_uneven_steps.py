"""Pins that calls have one right answer on ranks that have made different numbers of steps.

Nothing is in the way of it: a rank that is behind takes part in the others' rounds as it is. Until
version 0.1 the state was dead.
"""

from collections.abc import Sequence

import pytest
import torch

import commhooks
from tests.cases import ALGORITHMS, PERIODIC, Case, one_case
from tests.harness import rank_outcomes, run_ranks
from tests.training import Trainer
from tests.unseen.together import gap, mean

FORMS = [
    *(one_case(algorithm, 3) for algorithm in PERIODIC),
    Case("DiLoCo", {"tau": 3, **ALGORITHMS["DiLoCo"][1]}),
    Case("DiLoCo", {"tau": 4, "fragments": 2, "delay": 3}),
    Case("OverlapLocalSGD", {"tau": 2}, compression="int8"),
    Case("DiLoCo", {"tau": 3, "delay": 2}, compression="int4"),
    Case("OverlapLocalSGD", {"tau": 1}),
]


def stop_apart(cases: Sequence[Case], most: int, kind: str) -> None:
    """Ranks stop up to ``most`` steps apart, at every place between boundaries."""
    for case in cases:
        stop_one_apart(case, most, kind)


def stop_one_apart(case: Case, most: int, kind: str) -> None:
    # DDP agrees on its buckets in the second forward, for which it needs all ranks.
    for first in range(2, 2 + case.tau):
        trainer = Trainer(case)
        for _ in range(first + trainer.rank % (most + 1)):
            trainer.step()
        if kind == "finish":
            trainer.state.finish()
            assert gap(trainer.x) == 0.0
        else:
            with trainer.state.averaged():
                assert gap(trainer.x) == 0.0
        # Training goes on, and the rounds go on to meet.
        for _ in range(2 * case.tau + 1):
            trainer.step()
        trainer.state.finish()
        assert gap(trainer.x) == 0.0
        rounds = trainer.state.stats.rounds_launched
        assert gap(torch.tensor([float(rounds)])) == 0.0
        trainer.state.close()


@pytest.mark.parametrize("kind", ["finish", "averaged"])
def test_ranks_that_stop_a_step_apart(kind: str) -> None:
    run_ranks(stop_apart, 2, FORMS, 1, kind)


def test_three_ranks_that_stop_up_to_two_steps_apart() -> None:
    run_ranks(stop_apart, 3, [FORMS[1], FORMS[7], FORMS[-1]], 2, "finish")


def without_rounds_between() -> None:
    """The mean of what the ranks have."""
    trainer = Trainer(one_case("OverlapLocalSGD", 8))
    for _ in range(3 + trainer.rank):
        trainer.step()
    expected = mean(trainer.x)
    with trainer.state.averaged():
        torch.testing.assert_close(trainer.x, expected)
    trainer.state.finish()
    torch.testing.assert_close(trainer.x, expected)
    assert trainer.state.stats.step == 5


def test_the_answer_is_the_mean_of_what_they_have() -> None:
    run_ranks(without_rounds_between, 3)


def skip_a_batch() -> None:
    """A rank leaves out a bad batch in the middle of a run, and evaluations go on."""
    for case in FORMS:
        trainer = Trainer(case)
        for step in range(1, 11):
            if not (trainer.rank == 1 and step == 4):
                trainer.step()
            if step % 3 == 0:
                with trainer.state.averaged():
                    assert gap(trainer.x) == 0.0
        trainer.state.drift()
        trainer.state.finish()
        assert gap(trainer.x) == 0.0
        assert trainer.state.stats.step == 10


def test_a_rank_that_skips_a_batch() -> None:
    run_ranks(skip_a_batch, 2)


def whole_islands() -> None:
    trainer = Trainer(one_case("DiLoCo", 3, island=2))
    for _ in range(5 + trainer.rank // 2):
        trainer.step()
    with trainer.state.averaged():
        assert gap(trainer.x) == 0.0
    trainer.state.finish()
    assert gap(trainer.x) == 0.0
    for _ in range(4 + trainer.rank // 2):
        trainer.step()
    trainer.state.finish()
    assert gap(trainer.x) == 0.0
    for _ in range(trainer.rank // 2):
        trainer.step()
    trainer.state.finish()
    assert gap(trainer.x) == 0.0


def test_islands_a_step_apart() -> None:
    run_ranks(whole_islands, 4)


def behind_at_the_start(kind: str) -> None:
    """Others have made their first step since finish(), and this rank is in a call."""
    for case in FORMS:
        trainer = Trainer(case)
        for _ in range(case.tau + 2):
            trainer.step()
        trainer.state.finish()
        for _ in range(trainer.rank * 2):
            trainer.step()
        if kind == "finish":
            trainer.state.finish()
        elif kind == "averaged":
            with trainer.state.averaged():
                assert gap(trainer.x) == 0.0
        else:
            trainer.state.drift()
        for _ in range(2 * case.tau + 1):
            trainer.step()
        trainer.state.finish()
        assert gap(trainer.x) == 0.0
        trainer.state.close()


@pytest.mark.parametrize("kind", ["finish", "averaged", "drift"])
def test_a_rank_that_has_not_begun(kind: str) -> None:
    run_ranks(behind_at_the_start, 2, kind)


def written_to_behind() -> None:
    """The rank in the call takes the first rank's parameters, as it would in its own step."""
    trainer = Trainer(one_case("DiLoCo", 3))
    for _ in range(5):
        trainer.step()
    trainer.state.finish()
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.mul_(1.0 + trainer.rank)
    expected = trainer.x
    if trainer.rank == 1:
        trainer.step()
    trainer.state.finish()
    assert gap(trainer.x) == 0.0
    if trainer.rank == 0:
        # Two models of one start, one of which has made a step.
        assert 0.0 < (trainer.x - expected).norm() < 0.2 * expected.norm()


def test_a_rank_that_has_not_begun_takes_the_first_ones_parameters() -> None:
    run_ranks(written_to_behind, 2)


def far_apart(call: str) -> None:
    trainer = Trainer(one_case("OverlapLocalSGD", 2))
    for _ in range(3 + 30 * trainer.rank):
        trainer.step()
    if call == "finish":
        trainer.state.finish()
        assert gap(trainer.x) == 0.0
    else:
        with trainer.state.averaged():
            pass


def test_finish_waits_for_all_of_the_others_steps() -> None:
    run_ranks(far_apart, 2, "finish")


def test_averaged_does_not() -> None:
    """A rank that calls it alone is told while the others train, on all ranks."""
    for outcome in rank_outcomes(far_apart, 2, "averaged", group_timeout=600.0):
        assert isinstance(outcome.error, commhooks.RoundError), outcome.describe()
        assert "rank 0 at averaged() after step 3" in str(outcome.error)
        assert "(loss * 0).backward()" in str(outcome.error)


def in_warm_up() -> None:
    trainer = Trainer(one_case("OverlapLocalSGD", 2, warmup_steps=8))
    for _ in range(3 + trainer.rank):
        trainer.step()
    trainer.state.finish()


def test_in_warm_up_the_others_need_the_gradients() -> None:
    for outcome in rank_outcomes(in_warm_up, 2, group_timeout=600.0):
        assert isinstance(outcome.error, commhooks.RoundError), outcome.describe()
        assert "(loss * 0).backward()" in str(outcome.error)


def refusing(state_of_rank: int) -> None:
    """The rank that is behind cannot take part, and all ranks say why."""
    trainer = Trainer(one_case("OverlapLocalSGD", 2))
    for _ in range(3 + trainer.rank):
        trainer.step()
    if trainer.rank == state_of_rank:
        weight = trainer.model.module[0].weight
        trainer.model.module[0].weight = torch.nn.Parameter(weight.detach().clone())
    trainer.state.finish()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_refusal_is_told_to_all(rank: int) -> None:
    for outcome in rank_outcomes(refusing, 2, rank, group_timeout=600.0):
        assert isinstance(outcome.error, commhooks.RoundError), outcome.describe()
        assert "has been replaced" in str(outcome.error)
