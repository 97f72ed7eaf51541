"""Pins averaged() and finish(): the mean of the local models inside, bit-identical ones outside."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import commhooks
from tests.cases import ALGORITHMS, PERIODIC, Case, two_cases, with_tau
from tests.expected import (
    assert_close,
    assert_follows,
    assert_ranks_follow,
    reference_trajectory,
    reference_workers,
)
from tests.harness import run_ranks
from tests.training import Form, Trainer
from tests.workload import batch


def some_cases(algorithm: str, **settings: int) -> list[Case]:
    return [
        Case(algorithm, arguments, dtype=torch.float64, **settings)  # type: ignore[arg-type]
        for arguments in with_tau(algorithm, 3)
    ]


class Seen(NamedTuple):
    """A step's local model, the one inside the block, and whether the former was put back."""

    mine: Tensor
    inside: Tensor
    put_back: bool


def averaged_at_every_step(cases: Sequence[Case], form: Form) -> list[list[Seen]]:
    return [[_seen(trainer) for _ in range(trainer.case.steps)] for trainer in _each(cases, form)]


def _each(cases: Sequence[Case], form: Form) -> Iterator[Trainer]:
    for case in cases:
        yield Trainer(case, form)


def _seen(trainer: Trainer) -> Seen:
    mine = trainer.step()
    with trainer.state.averaged():
        inside = trainer.x
        with torch.no_grad():
            trainer.model(batch(0, 1, trainer.case.dtype)[0])  # evaluation
    return Seen(mine, inside, torch.equal(trainer.x, mine))


@pytest.mark.parametrize(("size", "form"), [(2, "hook"), (3, "register")])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_averaged_shows_the_mean_and_disturbs_nothing(
    algorithm: str, size: int, form: Form
) -> None:
    cases = some_cases(algorithm, warmup_steps=2)
    for case, *ranks in zip(
        cases, *run_ranks(averaged_at_every_step, size, cases, form), strict=True
    ):
        workers = reference_workers(case, size)
        for step in range(case.steps):
            x = workers.step(case.backward)
            for rank, seen in enumerate(each[step] for each in ranks):
                where = f"rank {rank}, step {step + 1}"
                assert_close(case, seen.mine, x[rank], where)
                assert_close(case, seen.inside, workers.consensus, f"consensus, {where}")
                assert torch.equal(seen.inside, ranks[0][step].inside), f"{where}: not the same"
                assert seen.put_back, where


FINISHES: Sequence[Sequence[int]] = ([1, 2], [4], [5, 10], [6])
"""Steps after which to finish: in warm-up, with a round in flight, at a boundary."""


def finished_and_continued(cases: Sequence[Case], form: Form) -> list[list[Tensor]]:
    return [Trainer(case, form).finishing(steps) for case in cases for steps in FINISHES]


@pytest.mark.parametrize("form", ["register", "hook"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_finish_ends_on_the_mean_and_starts_anew(algorithm: str, form: Form) -> None:
    """The anchor is the consensus then, and boundaries are counted from there."""
    cases = some_cases(algorithm, warmup_steps=2, steps=14)
    todo = [(case, finish_after) for case in cases for finish_after in FINISHES]
    ranks = run_ranks(finished_and_continued, 2, cases, form)
    for (case, finish_after), *real in zip(todo, *ranks, strict=True):
        workers = reference_workers(case, 2)
        expected = []
        for step in range(1, case.steps + 1):
            expected.append(workers.step(case.backward))
            if step in finish_after:
                expected.append([workers.finish()] * 2)
        assert_follows(case, real, expected)


def finished_ranks(cases: Sequence[Case]) -> list[Tensor]:
    finished = []
    for trainer in _each(cases, "register"):
        for _ in range(trainer.case.steps):
            trainer.step()
        trainer.state.finish()
        finished.append(trainer.x)
    return finished


def test_finish_leaves_the_same_bits_everywhere() -> None:
    cases = [
        Case(algorithm, arguments, steps=7)
        for algorithm in PERIODIC
        for arguments in with_tau(algorithm, 3)
    ]
    for first, *others in zip(*run_ranks(finished_ranks, 3, cases), strict=True):
        assert all(torch.equal(first, other) for other in others)


class Interrupted(Exception):
    pass


def left_by_an_exception(case: Case) -> tuple[bool, list[Tensor]]:
    trainer = Trainer(case)
    steps = [trainer.step() for _ in range(4)]
    put_back = False
    try:
        with trainer.state.averaged():
            raise Interrupted
    except Interrupted:
        put_back = torch.equal(trainer.x, steps[-1])
    return put_back, [*steps, *(trainer.step() for _ in range(4, case.steps))]


def test_averaged_puts_back_after_an_exception() -> None:
    case = Case("OverlapLocalSGD", {"tau": 3, "beta": 0.5})
    ranks = run_ranks(left_by_an_exception, 2, case)
    workers = reference_workers(case, 2)
    assert all(put_back for put_back, _ in ranks)
    expected = [workers.step(case.backward) for _ in range(case.steps)]
    assert_follows(case, [steps for _, steps in ranks], expected)


def nested_blocks(case: Case) -> list[bool]:
    trainer = Trainer(case)
    for _ in range(4):
        trainer.step()
    mine = trainer.x
    with trainer.state.averaged():
        outer = trainer.x
        with trainer.state.averaged():
            inner = trainer.x
        after_inner = trainer.x
    return [
        torch.equal(outer, inner),
        torch.equal(outer, after_inner),
        not torch.equal(outer, mine),
        torch.equal(trainer.x, mine),
    ]


def test_nested_blocks_are_one() -> None:
    assert run_ranks(nested_blocks, 2, Case("EASGD", {"tau": 3})) == [[True] * 4] * 2


def misused(case: Case) -> list[str]:
    """The errors of training and of finishing inside the block."""
    trainer = Trainer(case)
    for _ in range(4):
        trainer.step()
    errors = []
    for misuse in (trainer.backward, trainer.state.finish):
        with (
            trainer.state.averaged(),
            pytest.raises(commhooks.CommHooksError, match="averaged") as caught,
        ):
            misuse()
        errors.append(str(caught.value))
    return errors


def test_training_or_finishing_inside_the_block_is_refused() -> None:
    for training, finishing in run_ranks(misused, 2, Case("LocalSGD", {"tau": 3})):
        assert "outside" in training
        assert "leave the block" in finishing


def looked_at_in_inference_mode(case: Case) -> list[Tensor]:
    """Right after a resume, so that the first use of the vectors is inside the block."""
    first = Trainer(case)
    for _ in range(3):
        first.step()
    trainer = Trainer(case)
    trainer.steps = 3
    trainer.model.load_state_dict(first.model.state_dict())
    for mine, other in zip(trainer.optimizers, first.optimizers, strict=True):
        mine.load_state_dict(other.state_dict())
    trainer.state.load_state_dict(first.state.state_dict())
    with torch.inference_mode(), trainer.state.averaged():
        trainer.model.module(torch.zeros(1, 5))
    return [trainer.step() for _ in range(case.steps - 3)]


def test_averaged_in_inference_mode() -> None:
    """A tensor made in inference mode must not be used by training."""
    for case in two_cases():
        real = run_ranks(looked_at_in_inference_mode, 2, case)
        assert_follows(case, real, reference_trajectory(case, 2)[3:])


class Refused(Trainer):
    """Before every step, a backward inside the block, whose error is caught."""

    def step(self) -> Tensor:
        before = self.x
        if self.steps or self.form == "register":
            with (
                self.state.averaged(),
                pytest.raises(commhooks.RegistrationError, match="outside"),
            ):
                self.case.backward(self.model, self.rank, 100 + self.steps)
            assert torch.equal(self.x, before)
            assert self.state.stats.step == self.steps
            self.model.zero_grad()
        return super().step()


def refused_at_every_step(cases: Sequence[Case], form: Form) -> list[list[Tensor]]:
    runs = []
    for case in cases:
        trainer = Refused(case, form)
        runs.append([trainer.step() for _ in range(case.steps)])
    return runs


@pytest.mark.parametrize("form", ["register", "hook"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"static_graph": True},
        {"find_unused_parameters": True},
        {"gradient_as_bucket_view": True},
    ],
    ids=str,
)
def test_a_refused_backward_is_no_step(options: dict[str, bool], form: Form) -> None:
    """It may be the very first one, in warm-up, or with a round in flight."""
    cases = two_cases(warmup_steps=2, ddp=options)
    assert_ranks_follow(cases, run_ranks(refused_at_every_step, 2, cases, form))
