"""Pins that what an island's landing needs is gathered before it, and what happens if it is not.

No timing: ranks wait for a round to arrive where a test wants it to have, and collectives are
counted.
"""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import commhooks
from commhooks.engine.rounds.fragment import Fragment
from commhooks.engine.rounds.sharing import Sharing
from commhooks.engine.rules import Rules, weight_in_background
from commhooks.hyperparameters import Count, Steps
from tests.cases import ALGORITHMS, Case, with_tau
from tests.collectives import counted_collectives
from tests.diloco.family import ADAMW, deep_model, streaming
from tests.expected import assert_ranks_follow
from tests.harness import RankDied, rank_outcomes, run_ranks
from tests.islands.test_disagreement import turned
from tests.signals import Signals
from tests.training import Trainer, trajectory
from tests.workload import TINY_CAP_MB, batch, gradient

TAU, DELAY = 6, 4

BLEND = Case("DiLoCo", {"tau": TAU, "delay": DELAY, "alpha": 0.5}, island=2)
CARRY = Case("DiLoCo", {"tau": TAU, "delay": DELAY, "merge": "carry"}, island=2)
OVERLAPPED = [
    Case(algorithm, {"tau": TAU, **arguments}, island=2)
    for algorithm, arguments in (
        ("OverlapLocalSGD", {"beta": 0.7}),
        ("EASGD", {}),
        ("CoCoDSGD", {}),
    )
]


def fragment(trainer: Trainer) -> Fragment:
    """The first one."""
    engine = trainer.state._engine
    assert engine is not None
    return engine._fragments[0]


def await_arrival(trainer: Trainer) -> None:
    """Until the round in flight has arrived, on all ranks."""
    while (round := fragment(trainer).round) is not None and not round.arrived_well:
        time.sleep(0.002)
    dist.barrier()


class Calls(NamedTuple):
    """Of one step: the library's collectives in its backward and at its end, rounds launched."""

    backward: int
    boundary: int
    launched: int


def calls_of_steps(case: Case) -> list[Calls]:
    trainer = Trainer(case)
    seen = []
    for trainer.steps in range(1, 2 * TAU + 1):
        launched = trainer.state.stats.rounds_launched
        in_backward: Counter[str]
        with counted_collectives() as in_backward:
            trainer.backward()
        with counted_collectives() as at_its_end:
            trainer.optimize()
        launched = trainer.state.stats.rounds_launched - launched
        seen.append(Calls(in_backward["commhooks"], at_its_end["commhooks"], launched))
        await_arrival(trainer)
    trainer.state.finish()
    return seen


def calls(cases: Sequence[Case]) -> list[list[Calls]]:
    return [calls_of_steps(case) for case in cases]


def test_a_landing_that_was_gathered_for_starts_no_collective() -> None:
    """It is in the first backward after the arrival, behind the gradients.

    (The very first one has the ranks' common start.)
    """
    for runs in run_ranks(calls, 4, [BLEND, CARRY]):
        for steps in runs:
            usual = steps[1].backward
            for number, step in enumerate(steps, start=1):
                launch = number % TAU == 0
                assert (step.boundary > 0, step.launched) == (launch, launch), f"step {number}"
                assert (step.backward > usual) == (number in (1, TAU + 1)), f"step {number}"


def test_a_launch_that_is_a_landing_too_starts_its_round_alone() -> None:
    for runs in run_ranks(calls, 4, [BLEND, *OVERLAPPED]):
        (launch, *_), *overlapped = ([step for step in run if step.launched] for run in runs)
        for steps in overlapped:
            assert [step.boundary for step in steps] == [launch.boundary] * 2


def mixed_in_backwards(case: Case) -> list[bool]:
    """Whether a step's backward calls ``mix``, which it does for nothing but what is given."""
    trainer = Trainer(case)
    rules: Any = type(trainer.state)
    honest, calls = rules.mix, [0]

    def mix(state: Rules, **vectors: Tensor) -> None:
        calls[0] += 1
        honest(state, **vectors)

    rules.mix = mix
    seen = []
    for trainer.steps in range(1, 3 * TAU + 1):
        before = calls[0]
        trainer.backward()
        seen.append(calls[0] > before)
        trainer.optimize()
        # Ahead of the next backward, whichever thread is told of it.
        await_arrival(trainer)
    rules.mix = honest
    trainer.state.finish()
    return seen


@pytest.mark.parametrize("case", [BLEND, CARRY, *OVERLAPPED], ids=str)
def test_what_a_rank_gives_is_computed_when_its_round_arrives(case: Case) -> None:
    """Not in a later backward, but for what there is before the first round."""
    expected = [False] * (3 * TAU)
    expected[1] = case.algorithm != "DiLoCo"
    assert run_ranks(mixed_in_backwards, 4, case) == [expected] * 4


# Ranks that are not ready at the same time.


def trained_in_doubt(cases: Sequence[Case], unsure: Sequence[int]) -> list[list[Tensor]]:
    """Some ranks say of any result, now and then, that they do not have it yet."""
    honest, chance = Sharing.ready, random.Random(dist.get_rank())

    def ready(sharing: Sharing) -> int:
        return chance.randint(0, honest(sharing))

    if dist.get_rank() in unsure:
        Sharing.ready = ready  # type: ignore[assignment, method-assign]
    return [trajectory(case) for case in cases]


@pytest.mark.parametrize("unsure", [[1], [0, 1, 2, 3]], ids=str)
def test_whatever_the_ranks_are_ready_for_the_run_is_the_same(unsure: list[int]) -> None:
    """What only some can use is not gathered, or dropped again, and gathered at the landing."""
    settings: dict[str, Any] = {
        "dtype": torch.float64,
        "model": deep_model,
        "island": 2,
        "steps": 16,
    }
    overlapped = [
        Case(algorithm, arguments, **settings)
        for algorithm in ("OverlapLocalSGD", "EASGD", "CoCoDSGD")
        for arguments in with_tau(algorithm, 3)
    ]
    three = {"tau": 4, "fragments": 3, "delay": 4, "outer": ADAMW, "alpha": 0.3}
    todo = [*streaming(island=2), *overlapped, Case("DiLoCo", three, **settings)]
    real = run_ranks(trained_in_doubt, 4, todo, unsure)
    assert_ranks_follow(todo, real)
    for first, second in (real[:2], real[2:]):
        for one, other in zip(first, second, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def gathered_by(case: Case, unready: int) -> list[bool]:
    """Whether this rank gathers, step by step, while another never says that it could."""
    if dist.get_rank() == unready:
        Sharing.ready = lambda _: 0  # type: ignore[assignment, method-assign]
    trainer = Trainer(case)
    seen = []
    for trainer.steps in range(1, TAU + DELAY):
        trainer.backward()
        seen.append(fragment(trainer).gathered)
        trainer.optimize()
        await_arrival(trainer)
    trainer.state.finish()
    return seen


def test_nothing_is_gathered_that_a_mate_is_not_ready_for() -> None:
    first, second, *others = run_ranks(gathered_by, 4, BLEND, 1)
    assert not any(first + second)
    for seen in others:
        assert seen.index(True) == TAU


def delayed(case: Case, signals: Signals) -> list[Tensor]:
    """The second island stands still before its launch until the first is one step from landing."""
    trainer = Trainer(case)
    seen = []
    for step in range(1, case.steps + 1):
        if trainer.rank >= 2 and step == TAU:
            signals.await_("rank 0 is ahead")
        seen.append(trainer.step())
        if trainer.rank == 0 and step == TAU + DELAY - 1:
            assert not fragment(trainer).gathered
            signals.give("rank 0 is ahead")
    return seen


def test_a_round_that_is_late_is_gathered_at_its_landing(tmp_path: Path) -> None:
    case = replace(CARRY, dtype=torch.float64)
    real = run_ranks(delayed, 4, case, Signals(tmp_path), group_timeout=600.0)
    assert_ranks_follow([case], [[steps] for steps in real])


# What changes between the gathering and the landing.


def gathered_for(case: Case) -> Trainer:
    """A run after the step in which the gathering for the first landing has started."""
    trainer = Trainer(case)
    for _ in range(TAU):
        trainer.step()
    await_arrival(trainer)
    trainer.step()
    assert fragment(trainer).gathered
    return trainer


def rewound(case: Case) -> bool:
    """Whether a run goes on from a checkpoint as it did, though a later round is gathered for."""
    trainer = gathered_for(case)
    saved = trainer.saved()
    first = [trainer.step() for _ in range(TAU)]
    await_arrival(trainer)
    trainer.backward()
    assert fragment(trainer).gathered
    trainer.model.zero_grad()
    trainer.go_on(saved, TAU + 1)
    return all(torch.equal(x, trainer.step()) for x in first)


@pytest.mark.parametrize("delay", [DELAY, TAU])
def test_what_was_gathered_does_not_outlive_the_vectors(delay: int) -> None:
    case = replace(CARRY, arguments={"tau": TAU, "delay": delay, "merge": "carry"})
    assert run_ranks(rewound, 4, case) == [True] * 4


class End(NamedTuple):
    """What was raised after which step, and whether nothing was mixed in."""

    step: int
    said: str
    as_written: bool


def moved(case: Case, odd: int, late: bool) -> End:
    """A rank's parameter is moved: before the last backward ahead of the landing, or after it."""
    trainer = gathered_for(case)
    written: list[Tensor] = []
    (optimizer,) = trainer.optimizers
    handle = optimizer.register_step_post_hook(lambda *_: written.append(trainer.x))
    hooks: Any = optimizer._optimizer_step_post_hooks
    hooks.move_to_end(handle.id, last=False)
    for trainer.steps in range(TAU + 2, 4 * TAU):
        last = trainer.steps == TAU + DELAY
        try:
            if last and not late and trainer.rank == odd:
                turned(trainer)
            trainer.backward()
            if last and late and trainer.rank == odd:
                turned(trainer)
            trainer.optimize()
        except commhooks.RoundError as error:
            with pytest.raises(commhooks.RoundError):
                trainer.state.finish()
            return End(trainer.steps, str(error), torch.equal(trainer.x, written[-1]))
    return End(0, "nothing was raised", False)


def test_a_parameter_moved_after_the_gathering_is_told_at_the_landing() -> None:
    """By the backward before it, so that nothing is mixed on any rank of the island."""
    *others, first, second = reversed(run_ranks(moved, 4, BLEND, 1, False))
    for end in (first, second):
        assert end.step == TAU + DELAY, end
        assert "rank 1: A parameter changed its shape, strides" in end.said
        assert end.as_written
    for end in others:
        assert "an error in its island" in end.said


def test_a_parameter_moved_in_the_step_of_the_landing_ends_all_ranks() -> None:
    """Its rank is not mixed; its mates were told that it could, and find out in the next step."""
    ends = run_ranks(moved, 4, BLEND, 1, True)
    assert ends[1].step == TAU + DELAY
    assert "A parameter changed its shape, strides" in ends[1].said
    assert ends[1].as_written
    assert ends[0].step == TAU + DELAY + 1
    for end in (ends[0], *ends[2:]):
        assert "rank 1 at an error in its island" in end.said, end


def left_before_a_landing(case: Case, signals: Signals) -> None:
    """Rank 1 is killed when the others are in the step of the landing."""
    trainer = gathered_for(case)
    for _ in range(DELAY - 2):
        trainer.step()
    if trainer.rank == 1:
        trainer.steps += 1
        trainer.backward()
        signals.await_("rank 0 is near")
        os.kill(os.getpid(), signal.SIGKILL)
    trainer.steps += 1
    trainer.backward()
    signals.give(f"rank {trainer.rank} is near")
    trainer.optimize()
    for _ in range(2 * TAU):
        trainer.step()


def test_a_rank_that_dies_before_a_landing_ends_all_others(tmp_path: Path) -> None:
    outcomes = rank_outcomes(
        left_before_a_landing, 4, BLEND, Signals(tmp_path), timeout=15.0, group_timeout=600.0
    )
    assert isinstance(outcomes[1].error, RankDied), outcomes[1].describe()
    for outcome in (outcomes[0], *outcomes[2:]):
        assert isinstance(outcome.error, commhooks.RoundError), outcome.describe()


# Which rules can land that way.

DELAYED = [
    (algorithm, arguments)
    for algorithm in ("OverlapLocalSGD", "EASGD", "CoCoDSGD", "DiLoCo")
    for arguments in with_tau(algorithm, 3)
]


@pytest.mark.parametrize(("algorithm", "arguments"), DELAYED, ids=str)
def test_the_weight_of_x_is_that_in_mix(algorithm: str, arguments: dict[str, Any]) -> None:
    state: Rules = getattr(commhooks, algorithm)(**arguments)
    state.resolve(4)
    weight = state.weight_of_x
    assert weight is not None
    x, *drawn = torch.randn(2 + len(state.vectors), 8, dtype=torch.float64)
    vectors = dict(zip(("wire", *state.vectors), drawn, strict=True))
    b, kept = torch.zeros_like(x), {name: flat.clone() for name, flat in vectors.items()}
    state.mix(x=b, **kept)
    changed = [name for name, flat in vectors.items() if not torch.equal(flat, kept[name])]
    assert changed in ([], ["wire"])
    expected = weight * x + b
    state.mix(x=x, **vectors)
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_round_that_lands_at_once_is_mixed_as_it_lands(algorithm: str) -> None:
    for arguments in with_tau(algorithm, 3):
        state: Rules = getattr(commhooks, algorithm)(**arguments)
        state.resolve(4)
        assert (weight_in_background(state) is None) == (state.delay == 0)


@dataclass(eq=False, repr=False)
class Clipped(commhooks.DiLoCo):
    """Moves no number by more than 0.01 at a landing, which is no sum of x and something else."""

    tau: Steps = 3
    delay: Count = 2

    def mix(self, *, x: Tensor, wire: Tensor, z: Tensor, s: Tensor | None = None) -> None:
        x.add_(torch.sub(z, x, out=wire).clamp_(-0.01, 0.01))


def clipped(island: int | None) -> list[Tensor]:
    """On the data of an island, so that one of two ranks goes as one worker."""
    state = Clipped(island=island, bucket_cap_mb=TINY_CAP_MB)
    case = Case("DiLoCo", {"tau": 3}, backward=of_a_pair if island is None else gradient)
    trainer = Trainer(replace(case, dtype=torch.float64), state=state)
    return [trainer.step() for _ in range(9)]


def of_a_pair(model: torch.nn.Module, rank: int, step: int) -> None:
    """The mean of two ranks' gradients, in one backward."""
    pair = [batch(number, step, torch.float64) for number in (2 * rank, 2 * rank + 1)]
    x, y = (torch.cat(each) for each in zip(*pair, strict=True))
    torch.autograd.backward(torch.nn.functional.mse_loss(model(x), y))


def test_a_mix_of_ones_own_is_not_taken_for_that_of_its_base() -> None:
    assert weight_in_background(Clipped()) is None
    islands, workers = run_ranks(clipped, 4, 2), run_ranks(clipped, 2, None)
    for rank, steps in enumerate(islands):
        for mine, worker in zip(steps, workers[rank // 2], strict=True):
            torch.testing.assert_close(mine, worker)
