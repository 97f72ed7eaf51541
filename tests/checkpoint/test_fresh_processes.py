"""Pins resuming in processes that share nothing with the one that saved, at any step.

What lies in between: a file. In warm-up, at boundaries, with a round in flight, on 2 and 4 ranks.
Local steps go on bit for bit. Averaged gradients do on two ranks; on more, gloo sums by where in a
bucket a number lies, and a fresh process begins with other buckets (as under plain DDP).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.cases import ALGORITHMS, OVERLAPPED, Case, one_case, with_tau
from tests.harness import run_ranks
from tests.training import Form, Trainer, trajectory
from tests.workload import MakeOptimizers, adamw, nesterov_sgd

WARMUP_STEPS, TAU, STEPS = 4, 3, 12
SAVED = (1, 2, 3, 4, 5, 7, 8, 10)
"""Warm-up ends at 4; boundaries fall at 7 and 10."""


def cases(optimizers: MakeOptimizers) -> list[Case]:
    return [
        Case(algorithm, arguments, WARMUP_STEPS, optimizers, steps=STEPS)
        for algorithm in ALGORITHMS
        for arguments in with_tau(algorithm, TAU)
    ]


def path_of(folder: Path, number: int, step: int) -> Path:
    return folder / f"{number}-{step}-{dist.get_rank()}.pt"


def save(trainer: Trainer, path: Path) -> None:
    torch.save(trainer.saved(), path)


def loaded(case: Case, path: Path, step: int, form: Form) -> Trainer:
    trainer = Trainer(case, form)
    trainer.go_on(torch.load(path, weights_only=True), step)
    return trainer


def train_and_save(
    todo: Sequence[Case], folder: Path, form: Form = "register", disable_after: int = 0
) -> list[list[Tensor]]:
    """The trajectories of runs that save at `SAVED`, the last entry after finish()."""
    runs = []
    for number, case in enumerate(todo):
        trainer = Trainer(case, form)
        steps = []
        for step in range(1, STEPS + 1):
            steps.append(trainer.step())
            if step == disable_after:
                trainer.state.disable()
            if step in SAVED:
                if step > WARMUP_STEPS + TAU and case.algorithm in OVERLAPPED:
                    assert trainer.state.stats.rounds_launched > 0
                save(trainer, path_of(folder, number, step))
        trainer.state.finish()
        runs.append([*steps, trainer.x])
    return runs


def resume(
    todo: Sequence[Case], folder: Path, step: int, form: Form = "register"
) -> list[list[Tensor]]:
    """What is left of the trajectories from ``step`` on."""
    runs = []
    for number, case in enumerate(todo):
        trainer = loaded(case, path_of(folder, number, step), step, form)
        steps = [trainer.step() for _ in range(step, STEPS)]
        trainer.state.finish()
        runs.append([*steps, trainer.x])
    return runs


def one_step(todo: Sequence[Case], folder: Path, step: int) -> None:
    """A process that makes a single step from ``step`` on and saves."""
    for number, case in enumerate(todo):
        trainer = loaded(case, path_of(folder, number, step), step, "register")
        trainer.step()
        save(trainer, path_of(folder, number, step + 1))


def uninterrupted(todo: Sequence[Case]) -> list[list[Tensor]]:
    return [trajectory(case) for case in todo]


def assert_same(
    case: Case, a: Sequence[Tensor], b: Sequence[Tensor], what: str, *, bits: bool = True
) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y) if bits else torch.allclose(x, y, rtol=1e-5, atol=1e-6), (
            f"{case}: {what}"
        )


def same_bits(case: Case, size: int, saved_at: int) -> bool:
    """Whether no gradient is averaged from here on, or only two ranks add theirs."""
    return size <= 2 or (case.algorithm != "AllReduce" and saved_at >= case.warmup_steps)


def check(todo: Sequence[Case], size: int, folder: Path, at: Sequence[int]) -> None:
    bare = run_ranks(uninterrupted, size, todo)
    saved = run_ranks(train_and_save, size, todo, folder)
    for rank in range(size):
        for case, plain, one in zip(todo, bare[rank], saved[rank], strict=True):
            assert_same(case, plain, one[:-1], f"saving changed rank {rank}")
    for step in at:
        resumed = run_ranks(resume, size, todo, folder, step)
        for rank in range(size):
            for case, one, again in zip(todo, saved[rank], resumed[rank], strict=True):
                bits = same_bits(case, size, step)
                assert_same(case, one[step:], again, f"rank {rank}, saved at {step}", bits=bits)


@pytest.mark.slow
def test_two_ranks_go_on_bit_for_bit(tmp_path: Path) -> None:
    """From within warm-up, from a boundary, and with a round in flight."""
    check(cases(nesterov_sgd), 2, tmp_path, (1, 7, 8))


@pytest.mark.slow
def test_four_ranks_go_on_bit_for_bit(tmp_path: Path) -> None:
    check(cases(adamw), 4, tmp_path, (1, 4, 8))


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("optimizers", [nesterov_sgd, adamw])
def test_every_saved_step_goes_on_bit_for_bit(
    optimizers: MakeOptimizers, size: int, tmp_path: Path
) -> None:
    check(cases(optimizers), size, tmp_path, SAVED)


def check_from(
    step: int, todo: Sequence[Case], saved: Sequence[Sequence[Sequence[Tensor]]], *how: Any
) -> None:
    resumed = run_ranks(resume, len(saved), todo, *how)
    for rank, (before, after) in enumerate(zip(saved, resumed, strict=True)):
        for case, one, again in zip(todo, before, after, strict=True):
            what = f"{case.ddp}, rank {rank}, saved at {step}"
            # What these cases average from here on are gradients.
            assert_same(case, one[step:], again, what, bits=len(saved) <= 2)


def averaging_cases() -> list[Case]:
    options: list[dict[str, bool]] = [{}, {"find_unused_parameters": True}, {"static_graph": True}]
    return [Case("AllReduce", steps=STEPS, ddp=each) for each in options]


@pytest.mark.parametrize("form", ["register", "hook"])
def test_averaged_gradients_go_on(form: Form, tmp_path: Path) -> None:
    """Saved before DDP lays its buckets out anew, and after."""
    todo = averaging_cases()
    saved = run_ranks(train_and_save, 3, todo, tmp_path, form)
    for step in (1, 3):
        check_from(step, todo, saved, tmp_path, step, form)


def test_disabled_goes_on(tmp_path: Path) -> None:
    """Saved before any gradient was averaged."""
    todo = [one_case("LocalSGD", 3, steps=STEPS), one_case("EASGD", 2, steps=STEPS)]
    saved = run_ranks(train_and_save, 3, todo, tmp_path, "register", 4)
    check_from(4, todo, saved, tmp_path, 4)


@pytest.mark.parametrize("form", ["register", "hook"])
def test_local_steps_when_the_first_backward_has_many_buckets(form: Form, tmp_path: Path) -> None:
    """In the bare form the step is known at the last of them."""
    ddp = {"find_unused_parameters": True}
    todo = [
        Case("LocalSGD", {"tau": 3}, WARMUP_STEPS, steps=STEPS, ddp=ddp),
        Case("CoCoDSGD", {"tau": 2}, WARMUP_STEPS, steps=STEPS, ddp=ddp),
    ]
    saved = run_ranks(train_and_save, 2, todo, tmp_path, form)
    check_from(5, todo, saved, tmp_path, 5, form)
