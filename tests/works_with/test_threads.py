"""Pins that collectives are launched from the thread that trains, whatever other threads do."""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import commhooks
from tests.cases import Case
from tests.expected import assert_ranks_follow
from tests.harness import run_ranks
from tests.training import Form, Trainer, trajectory
from tests.workload import loss

T = TypeVar("T")

COLLECTIVES = ("all_reduce", "broadcast", "all_to_all_single", "all_gather_single")


@contextmanager
def launches_noted() -> Iterator[set[int]]:
    """The threads that launch collectives inside the block."""
    threads: set[int] = set()

    def noting(collective: Callable[..., Any]) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> Any:
            threads.add(threading.get_ident())
            return collective(*args, **kwargs)

        return launch

    with pytest.MonkeyPatch.context() as patch:
        for name in COLLECTIVES:
            patch.setattr(dist, name, noting(getattr(dist, name)))
        yield threads


@contextmanager
def another_thread(*deeds: Callable[[], object]) -> Iterator[None]:
    """Does all of ``deeds`` again and again, on a thread of its own, until the block ends."""
    over, failures = threading.Event(), []

    def run() -> None:
        try:
            while not over.is_set():
                for deed in deeds:
                    deed()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        sys.setswitchinterval(interval)
        # torch notes the model that runs for all threads together, and may be left with one.
        DistributedDataParallel._active_ddp_module = None
    assert failures == []


def on_a_thread(deed: Callable[[], T]) -> T:
    """What ``deed`` gives on a thread of its own, while this one waits."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(deed).result()


def evaluating(model: nn.Module) -> Callable[[], None]:
    def evaluate() -> None:
        with torch.no_grad():
            model(torch.zeros(1, 5))

    return evaluate


def polling(state: commhooks.CommHookState) -> Callable[[], object]:
    return lambda: state.stats


def assert_same(case: Case, steps: Sequence[Tensor], form: Form) -> None:
    """As the same training without other threads."""
    for number, (mine, alone) in enumerate(zip(steps, trajectory(case, form), strict=True), 1):
        assert torch.equal(mine, alone), (str(case), number)


def train_beside(cases: Sequence[Case], form: Form) -> None:
    """Another thread runs the model, and reads the figures, all the time."""
    for case in cases:
        trainer = Trainer(case, form)
        with launches_noted() as threads:
            if form == "hook":
                loss(trainer.model, dist.get_rank(), 1)
            with another_thread(evaluating(trainer.model), polling(trainer.state)):
                steps = [trainer.step() for _ in range(case.steps)]
                trainer.state.finish()
        assert threads == {threading.get_ident()}
        assert_same(case, steps, form)


CASES = [
    Case("OverlapLocalSGD", {"tau": 2}, compression="int8", steps=16),
    Case("DiLoCo", {"tau": 4, "fragments": 2, "delay": 2}, compression="int4", steps=16),
    Case("LocalSGD", {"tau": 2}, warmup_steps=2),
]


@pytest.mark.parametrize("form", ["register", "hook"])
def test_another_thread_runs_the_model(form: Form) -> None:
    """It took rounds off the queue that the training thread was at, or started second shots."""
    run_ranks(train_beside, 2, CASES, form)


def train_on_a_thread(cases: Sequence[Case], form: Form) -> None:
    """The main thread builds and registers, and then evaluates; another one trains."""
    for case in cases:
        trainer = Trainer(case, form)
        steps = [on_a_thread(trainer.step)]
        over = threading.Event()

        def train(
            trainer: Trainer = trainer,
            steps: list[Tensor] = steps,
            over: threading.Event = over,
        ) -> int:
            try:
                steps += [trainer.step() for _ in range(trainer.case.steps - 1)]
            finally:
                over.set()
            return threading.get_ident()

        with launches_noted() as threads, ThreadPoolExecutor(1) as pool:
            training = pool.submit(train)
            evaluate = evaluating(trainer.model)
            while not over.is_set():
                evaluate()
                assert trainer.state.stats.step <= case.steps
            assert threads == {training.result()}
        DistributedDataParallel._active_ddp_module = None
        # The main thread takes over.
        trainer.state.finish()
        assert trainer.state.stats.step == case.steps
        assert_same(case, steps, form)


@pytest.mark.parametrize("form", ["register", "hook"])
def test_training_on_another_thread_than_the_main_one(form: Form) -> None:
    run_ranks(train_on_a_thread, 2, CASES, form)


def evaluate_first(case: Case) -> list[Tensor]:
    """On one rank alone, before the first forward of training."""
    trainer = Trainer(case, "hook")
    if dist.get_rank() == 1:
        on_a_thread(evaluating(trainer.model))
    dist.all_reduce(torch.ones(3))
    return [trainer.step() for _ in range(case.steps)]


def test_an_evaluation_on_another_thread_does_not_register() -> None:
    """It waited there for the other ranks' registration, and they met another collective."""
    case = CASES[2]
    assert_ranks_follow([case], [[run] for run in run_ranks(evaluate_first, 2, case)])
