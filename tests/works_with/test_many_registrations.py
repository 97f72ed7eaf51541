"""Pins that a registration can end, and that many in one process do not use it up."""

import copy
import gc
import io
import os
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import commhooks
from tests.cases import Case
from tests.expected import assert_follows, reference_trajectory, reference_workers
from tests.harness import run_ranks
from tests.reference import flat
from tests.training import Form, Trainer, attach, make_state, wrapped
from tests.workload import gradient

CASES = [
    Case("LocalSGD", {"tau": 2}),
    Case("OverlapLocalSGD", {"tau": 2}),
    Case("EASGD", {"tau": 2}, warmup_steps=1),
    Case("AllReduce"),
]


class Held(NamedTuple):
    """Open files and threads of this process."""

    files: int
    threads: int

    @classmethod
    def now(cls) -> "Held":
        gc.collect()
        return cls(len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")))


def trial(case: Case, form: Form, close: bool) -> None:
    trainer = Trainer(case, form)
    for _ in range(3):
        trainer.step()
    trainer.state.finish()
    if close:
        trainer.state.close()


def a_sweep(form: Form, close: bool) -> tuple[Held, Held]:
    """What is held after the first few trials and after thirty."""
    for number in range(5):
        trial(CASES[number % len(CASES)], form, close)
    first = Held.now()
    for number in range(25):
        trial(CASES[number % len(CASES)], form, close)
    return first, Held.now()


@pytest.mark.parametrize(
    ("form", "close"), [("register", True), ("register", False), ("hook", True), ("hook", False)]
)
def test_a_sweep_of_trials_does_not_use_the_process_up(form: Form, close: bool) -> None:
    """Every state had a group of its own: five files and three threads, for good."""
    for first, last in run_ranks(a_sweep, 2, form, close):
        assert last.files <= first.files + 2
        assert last.threads <= first.threads + 2


def registered_anew(cases: Sequence[Case], form: Form) -> list[list[Tensor]]:
    """The same module and optimizers in three registrations, one after the other."""
    runs = []
    for case in cases:
        module = case.model(case.dtype)
        optimizers = case.optimizers(module)
        hooks = [len(o._optimizer_step_post_hooks) for o in optimizers]
        steps: list[Tensor] = []
        for _ in range(3):
            model, state = wrapped(module), make_state(case)
            attach(state, model, optimizers, form)
            for _ in range(5):
                gradient(model, dist.get_rank(), len(steps) + 1)
                for optimizer in optimizers:
                    optimizer.step()
                model.zero_grad()
                steps.append(flat(module.parameters()))
            state.finish()
            state.close()
            assert state.stats.step == 5
        assert hooks == [len(o._optimizer_step_post_hooks) for o in optimizers]
        runs.append(steps)
    return runs


@pytest.mark.parametrize("form", ["register", "hook"])
def test_a_module_is_wrapped_and_registered_anew(form: Form) -> None:
    cases = [case for case in CASES if not case.warmup_steps]
    for case, *real in zip(cases, *run_ranks(registered_anew, 2, cases, form), strict=True):
        workers, expected = reference_workers(case, 2), []
        for _ in range(3):
            expected += [workers.step(case.backward) for _ in range(5)]
            workers.finish()
        assert_follows(case, real, expected)


# Copies of a registered model.


def copied(cases: Sequence[Case], form: Form) -> list[list[Tensor]]:
    """A copy and a file of the DDP model in mid-run; using them is no step of the state."""
    runs = []
    for case in cases:
        trainer = Trainer(case, form)
        steps = [trainer.step() for _ in range(3)]
        file = io.BytesIO()
        torch.save(trainer.model, file)
        file.seek(0)
        for twin in (copy.deepcopy(trainer.model), torch.load(file, weights_only=False)):
            assert isinstance(twin, DistributedDataParallel)
            assert torch.equal(flat(twin.parameters()), trainer.x)
            with torch.no_grad():
                twin(torch.zeros(1, 5))
        assert trainer.state.stats.step == 3
        steps += [trainer.step() for _ in range(case.steps - 3)]
        runs.append(steps)
    return runs


@pytest.mark.parametrize("form", ["register", "hook"])
def test_a_registered_model_is_copied_and_saved_whole(form: Form) -> None:
    """A hook of the state's on the model was no function that pickle could find."""
    for case, *real in zip(CASES, *run_ranks(copied, 2, CASES, form), strict=True):
        assert_follows(case, real, reference_trajectory(case, 2))


def used_after_closing() -> None:
    trainer = Trainer(CASES[1])
    for _ in range(3):
        trainer.step()
    trainer.state.finish()
    trainer.state.close()
    for use in (trainer.state.finish, trainer.state.averaged().__enter__, trainer.state.state_dict):
        with pytest.raises(commhooks.RegistrationError):
            use()


def test_a_closed_state_is_no_longer_registered() -> None:
    run_ranks(used_after_closing, 2)
