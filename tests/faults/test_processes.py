"""Pins what becomes of the others when a rank is killed or stopped while a round is in transit."""

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import commhooks
from commhooks.engine.network.communicator import Communicator
from tests.cases import BLOCKING, OVERLAPPED, PERIODIC, Case, with_tau
from tests.expected import reference_trajectory
from tests.harness import Outcome, RankDied, rank_outcomes, run_ranks
from tests.signals import Signals
from tests.training import Trainer
from tests.workload import initialise, trained

TAU = 2


def wide_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """12 MB, so that a round takes a while; as many inputs as it has would make it overflow."""
    model = nn.Sequential(nn.Linear(5, 1000), nn.Linear(1000, 3000), nn.Linear(3000, 3))
    with torch.no_grad():
        for parameter in initialise(model).parameters():
            parameter.mul_(0.02)
    return model


written: list[list[Tensor]] = []
"""What this rank's optimizer last wrote, before anything of commhooks runs."""


def noted_sgd(model: nn.Module) -> Sequence[Optimizer]:
    parameters = trained(model)
    optimizer = SGD(parameters, lr=0.01, momentum=0.9)

    def note(*_: object) -> None:
        written[:] = [[p.detach().clone() for p in parameters]]

    optimizer.register_step_post_hook(note)
    return [optimizer]


def wide(algorithm: str) -> Case:
    return Case(algorithm, next(with_tau(algorithm, TAU)), optimizers=noted_sgd, model=wide_model)


@contextmanager
def dying_at_payload(number: int) -> Iterator[None]:
    """SIGKILL for this process right after it has handed over its ``number``-th payload."""
    start = Communicator.all_reduce
    payloads = 0

    def all_reduce(self: Communicator, tensor: Tensor) -> Any:
        nonlocal payloads
        future = start(self, tensor)
        payloads += tensor.numel() > 1000
        if payloads == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return future

    Communicator.all_reduce = all_reduce  # type: ignore[method-assign]
    try:
        yield
    finally:
        Communicator.all_reduce = start  # type: ignore[method-assign]


class End(NamedTuple):
    error: commhooks.RoundError
    as_written: bool


def train_until_an_error(case: Case, victim: int, payload: int) -> End:
    trainer = Trainer(case, bucket_cap_mb=25.0)
    number = payload if trainer.rank == victim else -1
    with dying_at_payload(number):
        for _ in range(4 * TAU):
            try:
                trainer.step()
            except commhooks.RoundError as error:
                own = zip(trained(trainer.model), written[0], strict=True)
                error.with_traceback(None)  # see test_leftovers.py
                assert trainer.x.isfinite().all()
                return End(error, all(torch.equal(p, before) for p, before in own))
    raise AssertionError("no round failed")


@pytest.mark.parametrize(
    "algorithm",
    [
        "LocalSGD",
        "OverlapLocalSGD",
        *(pytest.param(name, marks=pytest.mark.soak) for name in ("EASGD", "CoCoDSGD", "BMUF")),
    ],
)
def test_a_rank_killed_with_its_payload_on_the_way(algorithm: str) -> None:
    """The group's timeout is shorter than the test's: whoever waited longer would be stuck."""
    ends: list[Outcome[End]] = rank_outcomes(
        train_until_an_error, 3, wide(algorithm), 1, 2, group_timeout=8.0, timeout=60.0
    )
    assert isinstance(ends[1].error, RankDied), ends[1].describe()
    for end in (ends[0], ends[2]):
        assert end.value is not None, end.describe()
        assert end.value.as_written
        error = end.value.error
        assert (error.algorithm, error.ranks) == (algorithm, (0, 1, 2))
        assert error.round == 2
        # An overlapped round is looked at one boundary later.
        assert error.step == (2 * TAU if algorithm in BLOCKING else 3 * TAU)
        assert error.cause
        assert error.cause in str(error)


def stop_and_go_on(case: Case, seconds: float, signals: Signals) -> tuple[list[Tensor], Any]:
    """Rank 1 stops with a round in flight, until ``seconds`` after the others begin to wait."""
    trainer = Trainer(case)
    steps = []
    for step in range(1, case.steps + 1):
        if step == 2 * TAU and trainer.rank == 1:
            wake = f"while [ ! -e {signals.folder}/waiting ]; do sleep 0.05; done; sleep {seconds}"
            with subprocess.Popen(["sh", "-c", f"{wake}; kill -CONT {os.getpid()}"]):
                os.kill(os.getpid(), signal.SIGSTOP)
        elif step == 2 * TAU:
            signals.give("waiting")
        steps.append(trainer.step())
    trainer.state.finish()
    return [*steps, trainer.x], trainer.state.stats


def check_stopped(algorithm: str, seconds: float, folder: Path) -> None:
    case = Case(algorithm, next(with_tau(algorithm, TAU)), steps=8)
    (x0, stats), (x1, other) = run_ranks(stop_and_go_on, 2, case, seconds, Signals(folder))
    expected = reference_trajectory(case, 2)
    for rank, x in enumerate((x0, x1)):
        for step, vectors in enumerate(expected):
            assert (x[step] - vectors[rank]).abs().max() <= case.tolerance
    assert torch.equal(x0[-1], x1[-1])
    assert stats.rounds_completed == other.rounds_completed == case.steps // TAU
    # Rank 0 had at most the rest of a step to do before it could but wait.
    assert stats.seconds_exposed > seconds / 4


@pytest.mark.parametrize("algorithm", ["LocalSGD", "OverlapLocalSGD"])
def test_a_stopped_rank_is_waited_for(algorithm: str, tmp_path: Path) -> None:
    check_stopped(algorithm, 1.0, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("algorithm", [*BLOCKING, *OVERLAPPED])
def test_a_rank_stopped_for_five_seconds_is_waited_for(algorithm: str, tmp_path: Path) -> None:
    check_stopped(algorithm, 5.0, tmp_path)


def poison(case: Case, value: float, use: str) -> tuple[str, bool, int]:
    """Rank 1 writes ``value`` into one parameter; what everybody is told, and has then."""
    trainer = Trainer(case)
    for _ in range(TAU):
        trainer.step()
    if trainer.rank == 1:
        with torch.no_grad():
            next(iter(trained(trainer.model))).view(-1)[3] = value
    before = trainer.x
    try:
        if use == "averaged":
            with trainer.state.averaged():
                raise AssertionError("the block was entered")
        for _ in range(2 * TAU):
            trainer.backward()
            for optimizer in trainer.optimizers:
                optimizer.zero_grad()
                before = trainer.x
                optimizer.step()
        raise AssertionError("no round failed")
    except commhooks.RoundError as error:
        error.with_traceback(None)  # see test_leftovers.py
        after = trainer.x
        return str(error), torch.equal(before.nan_to_num(7.0), after.nan_to_num(7.0)), error.round


def poison_all(value: float, use: str) -> list[tuple[str, bool, int]]:
    cases = [Case(algorithm, next(with_tau(algorithm, TAU))) for algorithm in PERIODIC]
    return [poison(case, value, use) for case in cases]


@pytest.mark.parametrize("use", ["round", "averaged"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_would_poison_everybody(value: float, use: str) -> None:
    """The error names the rank on every rank, and nobody has the numbers but their owner."""
    for rank in run_ranks(poison_all, 3, value, use):
        for message, as_written, number in rank:
            assert "the parameters of rank(s) [1] hold NaN or inf" in message
            assert as_written
            assert number == (1 if use == "averaged" else 2)
